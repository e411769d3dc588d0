"""The backward products of a site in low precision: the transposed operation, on codes of the incoming gradient.

    y = s_a s_b (a b)      da = (g s_b) b^T      db = a^T (g s_a)

The scale of the operand that stays is moved onto the gradient, where it does not run along a summed axis; so its codes
are multiplied as they are, and only the gradient is rounded. The transposed operation is the one that JAX's own
transposition rule gives: its one product is read like any site's and runs on the same kernels (SwitchBack, Wortsman et
al. 2023, sections 2.2 and 3; AQT).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq import lowering
from jaxq.lowering import matrices
from jaxq.numbers import codecs
from jaxq.numbers.blocks import spread_axes
from jaxq.numbers.formats import Integers
from jaxq.numbers.qarray import QArray
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs import jaxpr, ops
from jaxq.programs.ops import Dot, Op

Operand = jax.Array | QArray
INT32_MAX = 2**31 - 1


class Rounding(NamedTuple):
    """How a gradient is rounded: not at all without a quantizer, stochastically with a key."""

    quantizer: Quantizer | None
    key: jax.Array | None

    @property
    def integer(self) -> bool:
        """Whether gradients become integer codes."""
        return self.quantizer is not None and self.quantizer.integer

    def __call__(self, g: jax.Array, contracted: tuple[int, ...]) -> Operand:
        """Return a gradient that is to be multiplied along `contracted` axes, in codes."""
        if self.quantizer is None:
            return g
        grid = self.quantizer.grid(g.shape, contracted)
        if self.key is None or self.quantizer.format.bits == 16:
            return codecs.encode(self.quantizer, g, grid).plain()
        return codecs.encode_stochastically(self.quantizer, g, grid, self.key).plain()


def gradient(
    op: Op, number: int, rounding: Rounding, g: jax.Array, other: Operand, shape: tuple[int, ...]
) -> jax.Array:
    """Return the gradient by operand `number` of a two-operand `op`, whose shape is `shape`, in float32.

    g: the gradient by the output, quantized here with one scale per index that this product does not sum over (or one
    for all), as `rounding` says; other: the operand that stays.
    """
    if rounding.quantizer is None and isinstance(other, QArray):
        other = other.decode(jnp.float32)
    codes, scale = _parted(op, 1 - number, other, len(shape))
    g = lax.convert_element_type(g, jnp.float32)
    g = g if scale is None else lax.mul(g, jnp.broadcast_to(scale, g.shape))
    spread = any(any(spread_axes(x)) for x in (g, codes))
    body = _transposed(op, number, shape, tuple(codes.shape), spread)
    return _run(body, rounding, g, codes, other)


def _parted(op: Op, side: int, operand: Operand, rank: int) -> tuple[jax.Array, jax.Array | None]:
    """Return an operand's codes, and its scale where the output has it; what is not integers, decoded.

    rank: that of the other operand.
    """
    if not isinstance(operand, QArray):
        return lax.convert_element_type(operand, jnp.float32), None
    if not operand.format.integer:
        return operand.decode(jnp.float32), None
    ranks = (operand.ndim, rank) if side == 0 else (rank, operand.ndim)
    return operand.codes, lowering.SCALES[type(op)](op, operand.scale, side, ranks)


@functools.lru_cache(maxsize=1024)
def _transposed(op: Op, number: int, shape: tuple[int, ...], other: tuple[int, ...], spread: bool) -> jaxpr.Body:
    """Return the program `(g, other) -> gradient by operand number`: one product with moves around it.

    spread: whether axes are spread over devices, and so must stay what they are.
    """
    plain = dataclasses.replace(op, precision=None, out_dtype=np.dtype("float32"))

    def forward(x: jax.Array, y: jax.Array) -> jax.Array:
        pair = (x, y) if number == 0 else (y, x)
        return matrices.product(plain, *pair) if isinstance(plain, Dot) and not spread else plain.apply(*pair)

    def backward(g: jax.Array, y: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda x: forward(x, y), _float32(shape))(g)[0]

    out = jax.eval_shape(forward, _float32(shape), _float32(other))
    return jaxpr.trace(backward, out, _float32(other))[0]


def _float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _run(body: jaxpr.Body, rounding: Rounding, g: jax.Array, codes: jax.Array, other: Operand) -> jax.Array:
    """Run a transposed operation; the gradient is rounded where it is multiplied, when it has been moved there."""
    env: dict[Any, Any] = dict(zip(body.invars, [*body.consts, g, codes], strict=True))
    grows = {body.invars[len(body.consts)]}  # what is made of the gradient
    for eqn in body.jaxpr.eqns:
        operands = [v.val if isinstance(v, jaxpr.Literal) else env[v] for v in eqn.invars]
        if jaxpr.is_site_primitive(eqn):
            mine = next(n for n, v in enumerate(eqn.invars) if v in grows)
            outs = [_product(ops.read(eqn), mine, rounding, operands, other)]
        else:
            outs = jaxpr.rebind(eqn, *operands)
        if any(v in grows for v in eqn.invars if not isinstance(v, jaxpr.Literal)):
            grows.update(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return env[body.jaxpr.outvars[0]]


def _check_sum(op: Op, operands: list, reach: int) -> None:
    """Raise where the int32 sums of a gradient could overflow."""
    terms = op.terms([x.shape for x in operands])
    if isinstance(terms, int) and terms > INT32_MAX // reach:
        shapes = " and ".join(str(list(x.shape)) for x in operands)
        raise ValueError(
            f"a gradient sums {terms} products of {shapes} in int32, where {INT32_MAX // reach} fit; keep it wide with "
            "grad=jaxq.Backward(...), or compute the gradient of fewer examples at a time"
        )


def _product(op: Op, mine: int, rounding: Rounding, operands: list, other: Operand) -> jax.Array:
    """Run the one product of a transposed operation, with operand `mine` quantized and the other one as codes."""
    if rounding.integer and isinstance(other, QArray) and other.format.integer:
        assert isinstance(other.format, Integers), "codes with integer kernels are integers"
        _check_sum(op, operands, rounding.quantizer.reach() * other.format.reach(True))
    pair: list[Operand] = list(operands)
    pair[mine] = rounding(operands[mine], op.contracted[mine])
    if isinstance(other, QArray) and other.format.integer:
        ones = jnp.ones((1,) * operands[1 - mine].ndim, jnp.float32)
        pair[1 - mine] = QArray(operands[1 - mine], ones, None, other.format, np.dtype("float32"))
    return lowering.run(op, pair, ())
