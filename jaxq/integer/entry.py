"""Where the float inputs of a program become codes: at the call, on the grid of the sites that take them.

An input may be moved, cut, padded and pooled on its way to the site; the codes are, in its place. Sites that took
ranges of different parts of it share a grid that covers them all. What nobody took may be beyond that grid: an input of
which sites take parts alone, and something else takes more, is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer.inputs import ENTRY, EXIT, undifferentiated
from jaxq.integer.products import Job
from jaxq.integer.values import INT8, Affine, Coded, ones
from jaxq.numbers import affine
from jaxq.numbers.catalog import int8
from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Body, CustomRule, Inline, Loop, Remat
from jaxq.programs.sites import Path

KEEPS = jaxpr.MOVES | jaxpr.PICKS | {jaxpr.PAD}


class Part(NamedTuple):
    """An argument of the program, or what was picked of it."""

    number: int
    picked: bool = False


class Takers(NamedTuple):
    """What takes an argument: sites, and as which operand; whether any takes it whole, and whether others take it."""

    sites: list[tuple[Job, int]]
    whole: list[bool]
    others: list[str]


Numbers = Sequence[Part | None]


def takers(body: Body, numbers: Sequence[int | None], jobs: Mapping[Path, Job]) -> dict[int, Takers]:
    """Return for each numbered argument what takes it."""
    found = {n: Takers([], [], []) for n in numbers if n is not None}
    for part in _follow(body, [None if n is None else Part(n) for n in numbers], jobs, (), found):
        if part is not None:
            found[part.number].others.append("an output")
    return {n: own for n, own in found.items() if own.sites}


def _follow(
    body: Body, numbers: Numbers, jobs: Mapping[Path, Job], path: Path, found: dict[int, Takers]
) -> list[Part | None]:
    """Add to `found`; return which argument each output is."""
    env: dict[Any, Part | None] = dict(zip(body.jaxpr.invars, numbers, strict=True))

    def number(v: Any) -> Part | None:
        return None if isinstance(v, jaxpr.Literal) else env.get(v)

    for place, eqn in enumerate(body.jaxpr.eqns):
        here, held = (*path, place), [number(v) for v in eqn.invars]
        if here in jobs:
            for n, argument in enumerate(held[:2]):
                if argument is not None and not jobs[here].obstacle:
                    found[argument.number].sites.append((jobs[here], n))
                    found[argument.number].whole.append(not argument.picked)
            continue
        sub = jaxpr.subprogram(eqn)
        if isinstance(sub, Inline | CustomRule | Remat):
            env.update(zip(eqn.outvars, _follow(sub.body, held, jobs, (*here, 0), found), strict=True))
        elif isinstance(sub, Loop):
            _follow_loop(sub, held, jobs, here, found)
        elif eqn.primitive in KEEPS and held[0] is not None:
            env[eqn.outvars[0]] = Part(held[0].number, held[0].picked or eqn.primitive in jaxpr.PICKS)
        else:
            for argument in filter(None, held):
                found[argument.number].others.append(eqn.primitive.name)
    return [number(v) for v in body.jaxpr.outvars]


def _follow_loop(
    loop: Loop, numbers: list[Part | None], jobs: Mapping[Path, Job], path: Path, found: dict[int, Takers]
) -> None:
    """Add what takes an argument in a loop: of layers, in each that it comes to."""
    states = slice(loop.constants, loop.constants + loop.carries)
    layers = (
        range(loop.length) if any(path in job.item.stacked for job in jobs.values()) else range(min(loop.length, 1))
    )
    for n in layers[:: -1 if loop.reverse else 1]:
        _follow(loop.body, numbers, {key: job.layer(path, n) for key, job in jobs.items()}, (*path, 0), found)
        numbers = [*numbers[: states.start], *(None for _ in range(loop.carries)), *numbers[states.stop :]]


def enter(x: jax.Array, takers: Takers) -> Coded:
    """Quantize an input to int8 codes, on the grid of the sites that take it: saturated; NaN is taken for zero."""
    grids = [job.grid(number) for job, number in takers.sites]
    (job, number), grid = takers.sites[0], grids[0]
    quantizer, own = job.quantizer(number), job.affine(number)
    with jax.ensure_compile_time_eval():
        if len(set(grids)) > 1:
            quantizer, grid = int8(per_tensor=True, symmetric=False), _covering(grids)
            own = affine.Affine(jnp.float32(grid.scale), jnp.int8(grid.zero_point))
        scale, zero = (None if part is None else jnp.reshape(part, (1,) * x.ndim) for part in own)
    with jax.named_scope(ENTRY):
        x = undifferentiated(x)
        known = lax.select(lax.ne(x, x), lax.full_like(x, 0), x)
        codes = affine.encode(quantizer, known, affine.Affine(scale, zero))
    low, high = (ones(end - grid.zero_point, x.ndim, np.int64) for end in (grid.low, grid.high))
    return Coded(_signed(codes), ones(grid.scale, x.ndim), low, high, grid.zero_point)


def _covering(grids: Sequence[Affine]) -> Affine:
    """Return one grid for all that several hold: zero is in each, and has a code."""
    low = min((grid.low - grid.zero_point) * grid.scale for grid in grids)
    high = max((grid.high - grid.zero_point) * grid.scale for grid in grids)
    scale = float(np.float32((high - low) / (INT8[1] - INT8[0])))
    return Affine(scale, int(np.clip(INT8[0] - np.rint(low / scale), *INT8)))


def _signed(codes: jax.Array) -> jax.Array:
    """Return int8 codes; unsigned ones move down by 128, which flips their first bit."""
    if codes.dtype == jnp.int8:
        return codes
    return lax.bitcast_convert_type(codes ^ np.uint8(128), jnp.int8)


def leave(v: Coded, dtype: Any) -> jax.Array:
    """Dequantize: `(codes - zero_point) * scale`, in float32."""
    codes = v.codes
    if v.zero_point:
        codes = lax.convert_element_type(codes, jnp.int32) - np.int32(v.zero_point)
    with jax.named_scope(EXIT):
        reals = lax.convert_element_type(codes, jnp.float32) * jnp.asarray(v.scale, jnp.float32)
        return lax.convert_element_type(reals, dtype)
