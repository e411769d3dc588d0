"""jaxq: quantization for JAX as a program transformation.

    plan    = jaxq.make_plan(f, jaxq.w8a8())(params, x)
    qparams = jaxq.convert(f, plan)(params, x)
    y       = jax.jit(jaxq.quantize(f, plan))(qparams, x)

A function is traced to a jaxpr, every matmul, convolution and embedding lookup is given a decision by a policy, and the
same program is interpreted again with quantize, dequantize and integer kernels in place.
"""

from jaxq.decisions.decision import Decision as Decision
from jaxq.decisions.decision import Fed as Fed
from jaxq.decisions.labels import labels as labels
from jaxq.decisions.plan import Plan as Plan
from jaxq.decisions.recipes import Uniform as Uniform
from jaxq.decisions.recipes import tflite as tflite
from jaxq.decisions.recipes import w8a8 as w8a8
from jaxq.decisions.recipes import weight_only as weight_only
from jaxq.decisions.resolve import revise as revise
from jaxq.decisions.scheme import After as After
from jaxq.decisions.scheme import Backward as Backward
from jaxq.decisions.scheme import Scheme as Scheme
from jaxq.integer.program import IntegerProgram as IntegerProgram
from jaxq.integer.program import integer as integer
from jaxq.interpretation.calibrate import calibrate as calibrate
from jaxq.interpretation.convert import convert as convert
from jaxq.interpretation.dampening import dampening as dampening
from jaxq.interpretation.freezing import freezing as freezing
from jaxq.interpretation.transforms import make_plan as make_plan
from jaxq.interpretation.transforms import observe as observe
from jaxq.interpretation.transforms import qat as qat
from jaxq.interpretation.transforms import quantize as quantize
from jaxq.io.artifact import Artifact as Artifact
from jaxq.io.checkpoint import load as load
from jaxq.io.checkpoint import save as save
from jaxq.io.compressed_reader import load_compressed_tensors as load_compressed_tensors
from jaxq.io.compressed_tensors import save_compressed_tensors as save_compressed_tensors
from jaxq.io.errors import FileError as FileError
from jaxq.io.export import export as export
from jaxq.measure.explain import explain as explain
from jaxq.measure.explanation import Explanation as Explanation
from jaxq.measure.tune import tune as tune
from jaxq.numbers.calibrators import EMA as EMA
from jaxq.numbers.calibrators import MinMax as MinMax
from jaxq.numbers.calibrators import OverflowRate as OverflowRate
from jaxq.numbers.calibrators import Range as Range
from jaxq.numbers.calibrators import ema as ema
from jaxq.numbers.calibrators import minmax as minmax
from jaxq.numbers.calibrators import overflow_rate as overflow_rate
from jaxq.numbers.catalog import apot as apot
from jaxq.numbers.catalog import b158 as b158
from jaxq.numbers.catalog import bfloat16 as bfloat16
from jaxq.numbers.catalog import binary as binary
from jaxq.numbers.catalog import dynamic_fixed as dynamic_fixed
from jaxq.numbers.catalog import fixed as fixed
from jaxq.numbers.catalog import float8 as float8
from jaxq.numbers.catalog import float8_e5m2 as float8_e5m2
from jaxq.numbers.catalog import float16 as float16
from jaxq.numbers.catalog import int2 as int2
from jaxq.numbers.catalog import int4 as int4
from jaxq.numbers.catalog import int8 as int8
from jaxq.numbers.catalog import int16 as int16
from jaxq.numbers.catalog import kmeans as kmeans
from jaxq.numbers.catalog import linear_quantize as linear_quantize
from jaxq.numbers.catalog import mxfp4 as mxfp4
from jaxq.numbers.catalog import mxfp6 as mxfp6
from jaxq.numbers.catalog import mxfp8 as mxfp8
from jaxq.numbers.catalog import mxint8 as mxint8
from jaxq.numbers.catalog import nf4 as nf4
from jaxq.numbers.catalog import nvfp4 as nvfp4
from jaxq.numbers.catalog import ternary as ternary
from jaxq.numbers.catalog import ttq as ttq
from jaxq.numbers.catalog import uint8 as uint8
from jaxq.numbers.clustering import k_means_quantize as k_means_quantize
from jaxq.numbers.estimators import EWGS as EWGS
from jaxq.numbers.estimators import ApproxSign as ApproxSign
from jaxq.numbers.estimators import HardTanh as HardTanh
from jaxq.numbers.fits import DKM as DKM
from jaxq.numbers.fits import MSE as MSE
from jaxq.numbers.fits import Entropy as Entropy
from jaxq.numbers.fits import MeanAbs as MeanAbs
from jaxq.numbers.fits import Octav as Octav
from jaxq.numbers.fits import Percentile as Percentile
from jaxq.numbers.fits import Sigmas as Sigmas
from jaxq.numbers.fits import dkm as dkm
from jaxq.numbers.fits import entropy as entropy
from jaxq.numbers.fits import mean_abs as mean_abs
from jaxq.numbers.fits import mse as mse
from jaxq.numbers.fits import octav as octav
from jaxq.numbers.fits import percentile as percentile
from jaxq.numbers.fits import sigmas as sigmas
from jaxq.numbers.floats import Float as Float
from jaxq.numbers.formats import Binary as Binary
from jaxq.numbers.formats import Codebook as Codebook
from jaxq.numbers.formats import Fixed as Fixed
from jaxq.numbers.formats import Int as Int
from jaxq.numbers.formats import Levels as Levels
from jaxq.numbers.formats import Ternary as Ternary
from jaxq.numbers.parameters import Learned as Learned
from jaxq.numbers.parameters import Parameters as Parameters
from jaxq.numbers.parameters import learned as learned
from jaxq.numbers.qarray import Dropped as Dropped
from jaxq.numbers.qarray import QArray as QArray
from jaxq.numbers.qarray import Stored as Stored
from jaxq.numbers.quantizers import Quantizer as Quantizer
from jaxq.numbers.rounding import Floor as Floor
from jaxq.numbers.rounding import NearestAway as NearestAway
from jaxq.numbers.rounding import NearestEven as NearestEven
from jaxq.numbers.rounding import Saturate as Saturate
from jaxq.numbers.rounding import Stochastic as Stochastic
from jaxq.numbers.rounding import TowardZero as TowardZero
from jaxq.numbers.rounding import Wrap as Wrap
from jaxq.numbers.rounding import stochastic as stochastic
from jaxq.numbers.rounding import straight_through as straight_through
from jaxq.programs.analysis import CoverageError as CoverageError
from jaxq.programs.sites import Operand as Operand
from jaxq.programs.sites import Site as Site
from jaxq.report.measure import report as report
from jaxq.report.report import Report as Report
from jaxq.report.report import SiteReport as SiteReport
from jaxq.report.saved import saved_report as saved_report
from jaxq.report.sensitivity import Effect as Effect
from jaxq.report.sensitivity import Sensitivity as Sensitivity
from jaxq.report.sensitivity import sensitivity as sensitivity

__version__ = "0.1.0"
