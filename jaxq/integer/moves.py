"""What moves values about: the codes move, and scales that differ by channel with them."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer.scales import alike, beside, constant, refined, together, uniform
from jaxq.integer.values import INT32, Coded, Constant, Mapped, Plain, Refusal, Value, ones, span
from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Eqn


def _transposed(eqn: Eqn, s: np.ndarray) -> np.ndarray:
    return np.transpose(s, eqn.params["permutation"])


def _squeezed(eqn: Eqn, s: np.ndarray) -> np.ndarray:
    return np.squeeze(s, tuple(eqn.params["dimensions"]))


def _spread(eqn: Eqn, s: np.ndarray) -> np.ndarray:
    shape = [1] * len(eqn.params["shape"])
    for axis, n in zip(eqn.params["broadcast_dimensions"], s.shape, strict=True):
        shape[axis] = n
    return s.reshape(shape)


def _cut(eqn: Eqn, s: np.ndarray) -> np.ndarray:
    strides = eqn.params["strides"] or (1,) * s.ndim
    triples = zip(eqn.params["start_indices"], eqn.params["limit_indices"], strides, strict=True)
    return s[tuple(slice(*three) if n > 1 else slice(None) for three, n in zip(triples, s.shape, strict=True))]


def _kept(eqn: Eqn, s: np.ndarray) -> np.ndarray:
    del eqn
    return s


# How an array of scales follows the codes; by what is not here, one scale for all does.
SCALES: dict[object, Callable[[Eqn, np.ndarray], np.ndarray]] = {
    lax.transpose_p: _transposed,
    lax.squeeze_p: _squeezed,
    lax.broadcast_in_dim_p: _spread,
    lax.slice_p: _cut,
    **dict.fromkeys(jaxpr.SAME_VALUE, _kept),
}

MOVES = (jaxpr.MOVES | {lax.slice_p, lax.tile_p}) - {lax.convert_element_type_p}


def move(eqn: Eqn, x: Value) -> Value:
    """Move codes; a table that is yet to be made waits for its argument moved."""
    if isinstance(x, Plain):
        return Plain(jaxpr.rebind(eqn, x.array)[0])
    if isinstance(x, Mapped):
        return Mapped(x.line._replace(root=_moved(eqn, x.line.root)))
    assert isinstance(x, Coded)
    return _moved(eqn, x)


def _moved(eqn: Eqn, v: Coded) -> Coded:
    rank = len(eqn.outvars[0].aval.shape)
    if eqn.primitive not in SCALES:
        v = uniform(v)
    codes = jaxpr.rebind(eqn, v.codes)[0]
    if eqn.primitive in SCALES:
        scale, low, high = (SCALES[eqn.primitive](eqn, _ranked(s, v.codes.ndim)) for s in (v.scale, v.low, v.high))
    else:
        scale = ones(v.scale.max(), rank)
        low, high = ones(v.low.min(), rank, np.int64), ones(v.high.max(), rank, np.int64)
    if not scale.size:  # none of channels of different scales
        scale, low, high = ones(1.0, rank), ones(0, rank, np.int64), ones(0, rank, np.int64)
    return Coded(codes, scale, low, high, v.zero_point, far=v.far, pair=v.pair, unit=v.unit)


def reshaped(v: Coded, shape: Sequence) -> Coded:
    """Return codes in another shape, of one scale if it is another one."""
    if tuple(shape) == v.codes.shape:
        return v
    v = uniform(v)
    return arranged(v, v.codes.reshape(shape))


def arranged(v: Coded, codes: jax.Array, *, filled: bool = False) -> Coded:
    """Return codes of values of one scale, in another arrangement, or some of them. filled: with zeros beside them."""
    low, high = int(v.low.min()), int(v.high.max())
    low, high = (min(low, 0), max(high, 0)) if filled else (low, high)
    like = alike(codes, float(v.scale.max()), low, high)
    return dataclasses.replace(like, zero_point=v.zero_point, far=v.far)


def _ranked(s: np.ndarray, rank: int) -> np.ndarray:
    return s.reshape((1,) * (rank - s.ndim) + s.shape)


def pad(eqn: Eqn, x: Coded, filling: Value) -> Coded:
    """Pad with the code of the number to be filled in: of zero, the zero point."""
    if not isinstance(filling, Constant):
        raise Refusal("pads with a value: only constants have an integer form")
    padded = tuple(axis for axis, n in enumerate(eqn.params["padding_config"]) if n != (0, 0, 0))
    if any(x.scale.shape[axis] > 1 for axis in padded):
        x = uniform(x)
    extra = beside([x], [filling])
    if extra and (x.is_narrow or extra / x.scale.max() > INT32[1]):
        (x,) = together([refined(x)], extra)
    steps = np.rint(filling.reals / x.scale.max()).astype(np.int64)
    if steps and x.scale.size > 1:
        raise Refusal("pads channels of different scales with another number than zero")
    code = x.codes.dtype.type(steps + x.zero_point)
    low, high = x.low.min(padded, keepdims=True), x.high.max(padded, keepdims=True)
    ends = np.minimum(low, steps), np.maximum(high, steps)
    return Coded(jaxpr.rebind(eqn, x.codes, code)[0], x.scale, ends[0], ends[1], x.zero_point)


def concatenate(eqn: Eqn, *parts: Value) -> Coded:
    """Values side by side along an axis, or stacked along a new one."""
    return joined(parts, [v.aval.shape for v in eqn.invars], lambda codes: jaxpr.rebind(eqn, *codes)[0])


def joined(parts: Sequence[Value], shapes: Sequence, join: Callable[[list[jax.Array]], jax.Array]) -> Coded:
    """Return values put together: of one grid as they are, of several at one scale. join: puts codes together."""
    data = [p for p in parts if isinstance(p, Coded)]
    grids = {(p.codes.dtype, p.scale.size == 1 and float(p.scale.max()), p.zero_point) for p in data}
    if len(grids) == 1 and len(data) == len(parts) and False not in next(iter(grids)):
        alike = data
    else:
        constants = [p for p in parts if isinstance(p, Constant)]
        alike = together([refined(p) for p in data] if constants else data, beside(data, constants))
    like, coded = alike[0], iter(alike)
    full = [constant(p, like) if isinstance(p, Constant) else next(coded) for p in parts]
    codes = join([jnp.broadcast_to(c.codes, shape) for c, shape in zip(full, shapes, strict=True)])
    low, high = (ones(end, codes.ndim, np.int64) for end in span(full))
    return Coded(codes, ones(like.scale.max(), codes.ndim), low, high, like.zero_point)


def split(eqn: Eqn, x: Value) -> list[Value]:
    """Cut into pieces along an axis; scales that differ along it are cut too."""
    if isinstance(x, Plain):
        return [Plain(y) for y in jaxpr.rebind(eqn, x.array)]
    if isinstance(x, Mapped):
        return [Mapped(x.line._replace(root=root)) for root in _pieces(eqn, x.line.root)]
    assert isinstance(x, Coded)
    return [*_pieces(eqn, x)]


def _pieces(eqn: Eqn, v: Coded) -> list[Coded]:
    axis, cuts = eqn.params["axis"], np.cumsum(eqn.params["sizes"])[:-1]
    codes = jaxpr.rebind(eqn, v.codes)

    def cut(s: np.ndarray) -> list[np.ndarray]:
        s = _ranked(s, v.codes.ndim)
        return np.split(s, cuts, axis) if s.shape[axis] > 1 else [s] * len(codes)

    fours = zip(codes, cut(v.scale), cut(v.low), cut(v.high), strict=True)
    return [Coded(*four, v.zero_point, far=v.far, pair=v.pair) for four in fours]


RULES: dict[object, Callable[..., Value]] = {lax.pad_p: pad, lax.concatenate_p: concatenate, lax.stack_p: concatenate}
