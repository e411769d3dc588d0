"""Broadcasting a small array over blocks of a large one: the one code path of every granularity.

A scale has the rank of the array it belongs to, and each of its dimensions divides the array's: 1 is "shared along this
axis", the full size is "one per index", anything between is "one per block". Per tensor, per channel, per token and per
group differ in nothing else.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def grid_shape(shape: Sequence[int], shared: Sequence[int], group: int | None = None) -> tuple[int, ...]:
    """Return the scale shape for `shape` with `shared` axes collapsed, the last one named in groups of `group`.

    Raises `ValueError` where groups do not divide that axis, and where there is none.
    """
    out = [1 if axis in shared else n for axis, n in enumerate(shape)]
    if group is not None:
        if not shared:
            raise ValueError(f"groups of {group} need an axis to run along, and every axis of {tuple(shape)} is kept")
        axis = tuple(shared)[-1]
        if group <= 0 or shape[axis] % group:
            raise ValueError(f"groups of {group} do not divide axis {axis} of shape {tuple(shape)}")
        out[axis] = max(1, shape[axis] // group)
    return tuple(out)


def check_grid(shape: Sequence[int], grid: Sequence[int]) -> None:
    """Raise unless every dimension of `grid` divides that of `shape`."""
    ok = len(shape) == len(grid) and all(
        g == n or g == 1 or (g and n % g == 0) for n, g in zip(shape, grid, strict=True)
    )
    if not ok:
        raise ValueError(f"a scale of shape {tuple(grid)} does not divide an array of shape {tuple(shape)}")


def _is_blocked(n: int, g: int) -> bool:
    return not (g == 1 or g == n)  # sizes may be symbolic, and have no order


def spread(small: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Return `small` in a shape that broadcasts against `shape`: blocks repeated, ones and full axes untouched."""
    if not any(_is_blocked(n, g) for n, g in zip(shape, small.shape, strict=True)):
        return small
    wide: list[int] = []
    fine: list[int] = []
    for n, g in zip(shape, small.shape, strict=True):
        wide += [g, n // g] if _is_blocked(n, g) else [g]
        fine += [g, 1] if _is_blocked(n, g) else [g]
    flat = [n if _is_blocked(n, g) else g for n, g in zip(shape, small.shape, strict=True)]
    return jnp.broadcast_to(small.reshape(fine), wide).reshape(flat)


def collapse(x: jax.Array, grid: Sequence[int], reduce: Callable) -> jax.Array:
    """Reduce `x` to shape `grid` with `reduce` (`lax.reduce_max` or `lax.reduce_min`) over every block."""
    check_grid(x.shape, grid)
    split: list[int] = []
    axes: list[int] = []
    for n, g in zip(x.shape, grid, strict=True):
        if g == n and n != 1:
            split.append(n)
        elif g == 1:
            axes.append(len(split))
            split.append(n)
        else:
            axes.append(len(split) + 1)
            split += [g, n // g]
    blocked = x if tuple(split) == x.shape else lax.reshape(x, split)
    return lax.reshape(reduce(blocked, tuple(axes)), grid) if axes else x


# Rows that become one in one go, and the fewest that are worth it.
THIN, MANY = 16, 64


def thinned(x: jax.Array, grid: Sequence[int], larger: Callable) -> jax.Array:
    """Return `x` with every sixteen rows made one by `larger`, where `grid` has its columns: part of a `collapse`.

    XLA:CPU reduces with maximum and minimum in a kernel of its own, for which it writes out the array that is reduced;
    windows by any other function are fused with what comes before them. Unlike a reduction, a window is never split
    between devices, so `larger` may be a function that they cannot exchange.
    """
    axis = next((a for a in range(x.ndim - 2, -1, -1) if grid[a] == 1 and x.shape[a] != 1), None)
    suits = axis is not None and grid[-1] == x.shape[-1] and isinstance(x.shape[axis], int)
    if not suits or x.shape[axis] < MANY or x.shape[axis] % THIN or spread_axes(x)[axis]:
        return x
    window = [THIN if a == axis else 1 for a in range(x.ndim)]
    return lax.reduce_window(x, np.zeros((), x.dtype), larger, window, window, "VALID")


def broadcast(per_block: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Return a number of every block at each of its values: [*shape]."""
    return jnp.broadcast_to(spread(per_block, shape), shape)


def spread_axes(x: Any) -> list[bool]:
    """Tell for each axis whether it is known to be spread over devices, by explicit sharding; of shapes, it is not."""
    spec = jax.typeof(x).sharding.spec if isinstance(x, jax.Array) else ()
    return [axis < len(spec) and spec[axis] is not None for axis in range(len(x.shape))]


def varying_axes(x: Any) -> frozenset[str] | None:
    """Return the mesh axes that a value is known to vary along inside `shard_map`; None where that is not tracked."""
    return getattr(getattr(jax.typeof(x), "mat", None), "varying", None)


def hide(tree):
    """Put an optimization barrier on every array of a tree: what XLA may not see it may not round differently.

    One barrier each, so that an array nobody reads is still dropped.
    """
    return jax.tree.map(lax.optimization_barrier, tree)


def to_rows(x: jax.Array, grid: Sequence[int]) -> jax.Array:
    """Return the blocks of `x` as rows: [blocks, elements of a block], blocks in the order of the grid."""
    check_grid(x.shape, grid)
    wide, order = _split(x.shape, grid)
    count = math.prod(grid)
    return lax.reshape(lax.transpose(lax.reshape(x, wide), order), (count, x.size // count if count else 0))


def from_rows(rows: jax.Array, grid: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """Return the array of `shape` that `to_rows` made rows of."""
    wide, order = _split(shape, grid)
    moved = lax.reshape(rows, [wide[axis] for axis in order])
    return lax.reshape(lax.transpose(moved, [order.index(axis) for axis in range(len(order))]), shape)


def _split(shape: Sequence[int], grid: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the shape with every axis split into (blocks, block), and the order that puts all blocks in front."""
    wide = [size for n, g in zip(shape, grid, strict=True) for size in (g, n // g if g else 0)]
    return wide, [*range(0, len(wide), 2), *range(1, len(wide), 2)]
