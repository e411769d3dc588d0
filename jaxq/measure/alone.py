"""A site by itself: its operation in float and as its plan runs it, on made-up data of the site's shapes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.decisions.decision import Decision
from jaxq.interpretation.numerics import Task, run_site, to_codes, weight_codes
from jaxq.numbers import calibrators, learning
from jaxq.numbers.calibrators import Leaf
from jaxq.numbers.qarray import QArray
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs.ops import Conv, Dot
from jaxq.programs.sites import Located

Programs = list[tuple[Callable, list]]


def kind_of(item: Located, decision: Decision) -> Any:
    """Return what two sites have in common that cost the same: hashable."""
    shapes = tuple((operand.shape, operand.dtype) for operand in item.site.operands)
    return item.op, shapes, item.weight, decision.scheme


def is_product(item: Located) -> bool:
    """Tell whether a site needs its operands only; lookups and ragged products also take indices, which are data."""
    return isinstance(item.op, Dot | Conv)


def programs(item: Located, decision: Decision) -> Programs:
    """Return the float and the quantized program of a site, each with its arguments; the weight is converted."""
    return _programs(item, decision, _operands(item))


def _programs(item: Located, decision: Decision, operands: list[jax.Array]) -> Programs:
    task = Task(item.op, decision.quantizers, item.weight)
    triples = zip(decision.quantizers, operands, item.op.contracted, strict=True)
    ranges = tuple(_range(*triple) for triple in triples)
    own = list(operands)
    if item.weight is not None and task.quantizers[item.weight] is not None:
        codes = jax.jit(functools.partial(weight_codes, task))(operands[item.weight], ranges[item.weight])
        own[item.weight] = codes.packed()
    return [
        (lambda xs: item.op.apply(*xs), operands),
        (lambda xs: run_site(task, tuple(xs[0]), xs[1], ()), [own, ranges]),
    ]


def coded(item: Located, decision: Decision) -> tuple[QArray, ...]:
    """Return the shapes of a site's operands in codes, as its kernel is given them; all operands are quantized."""
    shapes = [jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in item.site.operands]
    own, ranges = jax.eval_shape(lambda xs: _programs(item, decision, xs)[1][1], shapes)
    task = Task(item.op, decision.quantizers, item.weight)

    def codes(number: int, x: Any, r: Leaf | None) -> QArray:
        return x if isinstance(x, QArray) else jax.eval_shape(functools.partial(to_codes, task, number), x, r)

    return tuple(codes(n, *pair) for n, pair in enumerate(zip(own, ranges, strict=True)))


def _operands(item: Located) -> list[jax.Array]:
    # By NumPy: JAX would compile a program of random numbers for every shape.
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal(o.shape, np.float32), jnp.dtype(o.dtype)) for o in item.site.operands]
    return [jax.device_put(values.astype(dtype)) for values, dtype in pairs]


def _range(quantizer: Quantizer | None, x: jax.Array, contracted: tuple[int, ...]) -> Leaf | None:
    """Return the range of normal data, or the parameters learned from `x`, for a static quantizer."""
    if quantizer is None or not quantizer.static:
        return None
    if quantizer.learned:
        grid = quantizer.grid(x.shape, contracted)
        return learning.observe(quantizer, x, grid, learning.unobserved((), quantizer, x.shape, grid))
    four = jnp.float32(4)
    return calibrators.unobserved((), quantizer)._replace(lo=-four, hi=four, count=jnp.float32(1))
