"""Integer kernels: the program to emit for an operation on codes.

`run` is the whole interface: it takes operands as arrays or `QArray`s and returns the float result. A kernel returns
int32 sums and the scale of each output element; `acc * scale` is the only float arithmetic after it.
"""

from collections.abc import Callable, Sequence

import jax
from jax import lax

from jaxq.lowering import conv, dot
from jaxq.lowering.conv import integer_conv
from jaxq.lowering.dequantize import dequantize
from jaxq.lowering.dot import integer_dot
from jaxq.lowering.embedding import lookup
from jaxq.lowering.ragged import integer_ragged_dot
from jaxq.numbers.qarray import QArray
from jaxq.programs.ops import Conv, Dot, Embedding, Op, RaggedDot

KERNELS: dict[type, Callable] = {Dot: integer_dot, Conv: integer_conv, RaggedDot: integer_ragged_dot}

# How a scale of an operand, one on its contracted axes, broadcasts against the output: (op, scale, side, ranks).
SCALES: dict[type, Callable] = {Dot: dot.to_output, Conv: conv.to_output}


def run(op: Op, operands: Sequence[jax.Array | QArray], rest: Sequence[jax.Array]) -> jax.Array:
    """Run an operation: integers where all operands are codes, otherwise float on decoded operands."""
    if isinstance(op, Embedding):
        return lookup(op, operands[0], rest)
    if not all(isinstance(operand, QArray) and operand.format.integer for operand in operands):
        return op.apply(*(_plain(operand) for operand in operands), *rest)
    acc, scale = KERNELS[type(op)](op, *operands, *rest)
    return lax.convert_element_type(dequantize(acc, scale), op.out_dtype)


def _plain(operand: jax.Array | QArray) -> jax.Array:
    return operand.decode() if isinstance(operand, QArray) else operand
