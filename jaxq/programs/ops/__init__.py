"""The operations that can be quantized, one file each: which axes may carry a scale and which are summed over.

`read` turns an equation into an `Op`, or says why it cannot be one. An `Op` is frozen and hashable, knows no values,
and runs on plain arrays with `apply`. How it runs on codes is in `jaxq.lowering`.
"""

from jaxq.programs import jaxpr
from jaxq.programs.ops.conv import Conv as Conv
from jaxq.programs.ops.dot import Dot as Dot
from jaxq.programs.ops.embedding import Embedding as Embedding
from jaxq.programs.ops.ragged import RaggedDot as RaggedDot

Op = Dot | Conv | RaggedDot | Embedding


def read(eqn: jaxpr.Eqn) -> Op:
    """Return the operation of a site equation."""
    if eqn.primitive is jaxpr.DOT:
        return Dot.read(eqn)
    if eqn.primitive is jaxpr.CONV:
        return Conv.read(eqn)
    if eqn.primitive is jaxpr.GATHER:
        return Embedding.read(eqn)
    if eqn.primitive is jaxpr.SLICE:
        return Embedding.read_slice(eqn)
    return RaggedDot.read(eqn)
