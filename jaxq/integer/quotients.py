"""One value over another: times what one over it is, or, where a site takes the quotient, divided at its grid.

What a value is divided by is often far from all that it might be, and of what is proved to be no more than "not below
zero" one over it has no bound. A site knows how large the quotient gets: there it is computed from the first bits of
both, as of floats, and saturates where it is larger.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer import arithmetic, curves
from jaxq.integer.moves import MOVES, move
from jaxq.integer.scales import uniform, widened
from jaxq.integer.values import HIDDEN, INT32, Affine, Coded, Mapped, Refusal, Rowed, Value, line_of, ones
from jaxq.numbers.requantize import to_codes

# Bits of a quotient's parts.
BITS = 15


def quotient(a: Value, b: Value) -> Coded:
    """a / b, as a times what one over b is; refuse it where b may be zero, or differs by too many octaves."""
    line = line_of(b)
    assert line is not None, "codes are a function of themselves"
    over = Mapped(line._replace(of=lambda x: 1 / line.of(x), name="one over a value"))
    try:
        factor = curves.made(over)
    except Refusal:
        raise Refusal(
            "divides by what may be zero, or near to it: bound it from below, by jnp.maximum or a sum, or have a site "
            "of the plan take the quotient as it is"
        ) from None
    return arithmetic.mul(None, curves.formed(a), factor)


def placed(x: Rowed, grid: Affine) -> Coded:
    """Return a quotient's int8 codes on the grid of who takes it; raise why there are none of anything else."""
    eqn, operands = x.by
    if eqn.primitive in MOVES and isinstance(operands[0], Rowed):
        moved = move(eqn, placed(operands[0], grid))
        assert isinstance(moved, Coded)
        return moved
    if eqn.primitive is not lax.div_p or not all(isinstance(v, Coded | Mapped) for v in operands):
        raise x.why
    a, b = (uniform(widened(curves.formed(v))) for v in operands)
    if min(a.far, b.far) < np.inf:
        raise Refusal(f"takes {HIDDEN}")
    codes = to_codes(divided(a.codes, b.codes, float(a.scale.max() / b.scale.max() / grid.scale)), *grid[1:])
    low, high = (ones(end - grid.zero_point, codes.ndim, np.int64) for end in (grid.low, grid.high))
    return Coded(codes, ones(grid.scale, codes.ndim), low, high, grid.zero_point)


def divided(a: jax.Array, b: jax.Array, ratio: float) -> jax.Array:
    """Return `ratio a / b`, rounded, within 2^-12 of what it is; up to 2^27 and more, and so it is where b is zero.

    a, b: int32.

    >>> divided(jnp.int32([8, -7, 1000, 0]), jnp.int32([3, 3, -3, 0]), 1.0).tolist()
    [3, -2, -333, 0]
    """
    (above, up), (below, down) = _first_bits(a), _first_bits(b)
    product = (above >> 1) * lax.div(jnp.int32(INT32[1]), lax.max(below, np.int32(2**BITS)))
    fraction, exponent = np.frexp(ratio)
    product = (product >> BITS) * np.int32(round(fraction * 2**BITS))
    shift = jnp.where(b == 0, 1, 30 - int(exponent) + up - down)
    n = lax.clamp(np.int32(1), shift, np.int32(31))
    rounded = jnp.where(shift > 31, 0, (product >> n) + ((product >> (n - 1)) & 1))
    return jnp.where((a < 0) != (b < 0), -rounded, rounded)


def _first_bits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the first sixteen bits of a number without its sign, and how many zeros are before them: of zero, zero."""
    size = lax.abs(lax.max(x, np.int32(-INT32[1])))
    up = lax.clz(size)
    return (size << (up - 1)) >> BITS, up
