"""jaxq: quantization for JAX as a program transformation.

    plan    = jaxq.make_plan(f, jaxq.w8a8())(params, x)
    qparams = jaxq.convert(f, plan)(params, x)
    y       = jax.jit(jaxq.quantize(f, plan))(qparams, x)

A function is traced to a jaxpr, every matmul, convolution and embedding lookup is given a decision by a policy, and the
same program is interpreted again with quantize, dequantize and integer kernels in place.
"""

from jaxq.decisions.decision import Decision as Decision
from jaxq.decisions.plan import Plan as Plan
from jaxq.decisions.recipes import Uniform as Uniform
from jaxq.decisions.recipes import w8a8 as w8a8
from jaxq.decisions.recipes import weight_only as weight_only
from jaxq.decisions.scheme import Scheme as Scheme
from jaxq.interpretation.calibrate import calibrate as calibrate
from jaxq.interpretation.convert import convert as convert
from jaxq.interpretation.transforms import make_plan as make_plan
from jaxq.interpretation.transforms import observe as observe
from jaxq.interpretation.transforms import qat as qat
from jaxq.interpretation.transforms import quantize as quantize
from jaxq.numbers.calibrators import EMA as EMA
from jaxq.numbers.calibrators import MinMax as MinMax
from jaxq.numbers.calibrators import Range as Range
from jaxq.numbers.calibrators import ema as ema
from jaxq.numbers.calibrators import minmax as minmax
from jaxq.numbers.formats import Int as Int
from jaxq.numbers.qarray import Dropped as Dropped
from jaxq.numbers.qarray import QArray as QArray
from jaxq.numbers.qarray import Stored as Stored
from jaxq.numbers.quantizers import Quantizer as Quantizer
from jaxq.numbers.quantizers import int2 as int2
from jaxq.numbers.quantizers import int4 as int4
from jaxq.numbers.quantizers import int8 as int8
from jaxq.numbers.quantizers import linear_quantize as linear_quantize
from jaxq.numbers.quantizers import uint8 as uint8
from jaxq.programs.analysis import CoverageError as CoverageError
from jaxq.programs.sites import Operand as Operand
from jaxq.programs.sites import Site as Site

__version__ = "0.1.0"
