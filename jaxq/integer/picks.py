"""What picks values by their place or puts them there, and what orders them: the codes, which have one scale.

Codes are in the order of the numbers that they stand for, so that a sort of codes is a sort of numbers; numbers that
stand for larger ones stay such.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxq.integer.hidden import check_near
from jaxq.integer.moves import arranged, joined
from jaxq.integer.scales import coded, uniform
from jaxq.integer.values import Coded, Constant, Plain, Refusal, Value, as_array
from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Eqn


def check_filling(mode: Any, number: Any) -> None:
    """Refuse numbers other than zero where an index is out of bounds; what the program has as NaN is zero."""
    filled = mode == lax.GatherScatterMode.FILL_OR_DROP and number is not None
    if filled and not np.isnan(number) and number != 0:
        raise Refusal(f"fills in {number} where an index is out of bounds: fill in zero, or clip the index")


def _places(eqn: Eqn, indices: Sequence[Value], first: int) -> list[jax.Array]:
    """Return the arrays of indices, the operands of an equation from the `first` on."""
    return [as_array(x, v.aval) for x, v in zip(indices, eqn.invars[first:], strict=False)]


def gather(eqn: Eqn, x: Coded | Constant, indices: Value) -> Coded:
    """Values at indices; zeros where an index is out of bounds and the program has NaN."""
    p = eqn.params
    check_filling(p["mode"], p["fill_value"])
    v, (places,) = coded(x, eqn.invars[0].aval), _places(eqn, [indices], 1)
    codes = lax.gather(
        v.codes,
        places,
        dimension_numbers=p["dimension_numbers"],
        slice_sizes=p["slice_sizes"],
        unique_indices=p["unique_indices"],
        indices_are_sorted=p["indices_are_sorted"],
        mode=p["mode"],
        fill_value=v.codes.dtype.type(v.zero_point),
    )
    return arranged(v, codes, filled=p["mode"] == lax.GatherScatterMode.FILL_OR_DROP)


def dynamic_slice(eqn: Eqn, x: Coded | Constant, *starts: Value) -> Coded:
    """A part that begins at an index."""
    v = coded(x, eqn.invars[0].aval)
    return arranged(v, jaxpr.rebind(eqn, v.codes, *_places(eqn, starts, 1))[0])


def _put(pairs: Sequence[tuple[Value, Any]], put: Callable[[list[jax.Array]], jax.Array]) -> Coded:
    """Return values with others put in among them, all of one scale. pairs: both, and their variables."""
    parts = [coded(x, v.aval) for x, v in pairs]
    check_near(parts)
    return joined(parts, [part.codes.shape for part in parts], put)


def dynamic_update_slice(eqn: Eqn, x: Value, update: Value, *starts: Value) -> Coded:
    """Values with others put in at an index, such as a decoder's cache."""
    pairs, at = [(x, eqn.invars[0]), (update, eqn.invars[1])], _places(eqn, starts, 2)
    return _put(pairs, lambda codes: jaxpr.rebind(eqn, *codes, *at)[0])


def scatter(eqn: Eqn, x: Value, indices: Value, update: Value) -> Coded:
    """Values with others put in at indices."""
    pairs, (at,) = [(x, eqn.invars[0]), (update, eqn.invars[2])], _places(eqn, [indices], 1)
    return _put(pairs, lambda codes: jaxpr.rebind(eqn, codes[0], at, codes[1])[0])


def cumulative(eqn: Eqn, x: Coded) -> Coded:
    """The largest or the smallest of a value and all before it."""
    v = uniform(x)
    return arranged(v, jaxpr.rebind(eqn, v.codes)[0])


# --- several results -------------------------------------------------------------------------------------------------


def _opened(eqn: Eqn, operands: Sequence[Value]) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], list]]:
    """Return arrays to be reordered, and what makes values of them again."""
    pairs = zip(operands, eqn.invars, strict=True)
    kept = [coded(x, v.aval) if jaxpr.is_float(v.aval) else Plain(as_array(x, v.aval)) for x, v in pairs]
    arrays = [v.codes if isinstance(v, Coded) else v.array for v in kept]

    def closed(arrays: Sequence[jax.Array]) -> list:
        pairs = zip(kept, arrays, strict=True)
        return [arranged(v, a) if isinstance(v, Coded) else Plain(a) for v, a in pairs]

    return arrays, closed


def sort(eqn: Eqn, *operands: Value) -> list:
    """Values in order, and whatever goes with them."""
    arrays, closed = _opened(eqn, operands)
    return closed(jaxpr.rebind(eqn, *arrays))


def top_k(eqn: Eqn, x: Coded) -> list:
    """The largest values, and where they are."""
    v = uniform(x)
    codes, places = jaxpr.rebind(eqn, v.codes)
    return [arranged(v, codes), Plain(places)]


RULES: dict[object, Callable[..., Value]] = {
    jaxpr.GATHER: gather,
    jaxpr.SLICE: dynamic_slice,
    lax.dynamic_update_slice_p: dynamic_update_slice,
    lax.scatter_p: scatter,
    lax.cummax_p: cumulative,
    lax.cummin_p: cumulative,
}
# What has several results.
SEVERAL: dict[object, Callable[..., list]] = {lax.sort_p: sort, lax.top_k_p: top_k}
