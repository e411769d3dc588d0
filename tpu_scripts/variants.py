"""The variants of a model that are measured and compiled: what is quantized, and how."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxq
from bench_models import Model

VARIANTS: dict[str, jaxq.Uniform | jaxq.Scheme] = {
    "int8 static": jaxq.w8a8(static=True),
    "int8 dynamic": jaxq.w8a8(),
    "int4 weights": jaxq.Scheme(weight=jaxq.int4(), act=jaxq.int8()),
}


def plan_of(model: Model, variant: str, params: Any, x: Any) -> jaxq.Plan:
    """Return the plan of a variant from shapes alone; static ranges are those of data between -1 and 1."""
    plan = jaxq.make_plan(model.apply, VARIANTS[variant])(params, x)
    one = jnp.float32(1)
    return jax.tree.map(
        lambda r: r._replace(lo=jnp.full_like(r.lo, -one), hi=jnp.full_like(r.hi, one), count=jnp.ones_like(r.count)),
        plan,
        is_leaf=lambda node: isinstance(node, jaxq.Range),
    )


def serving(model: Model, variant: str, params: Any, x: jax.Array) -> tuple[Callable, Any]:
    """Convert the weights, calibrate if static, and return the program, to be compiled, and what it takes for them."""
    plan = jaxq.make_plan(model.apply, VARIANTS[variant])(params, x)
    if plan.unobserved():
        plan = jaxq.calibrate(model.apply, plan, progress=False)(params, [x])
    return jax.jit(jaxq.quantize(model.apply, plan)), jaxq.convert(model.apply, plan)(params, x)


def call_of(model: Model, variant: str, params: Any, x: jax.Array) -> Callable[[], jax.Array]:
    """Return a call of the compiled program."""
    serve, converted = serving(model, variant, params, x)
    return lambda: serve(converted, x)
