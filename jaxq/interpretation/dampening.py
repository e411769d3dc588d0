"""Oscillation dampening: a term of the loss that keeps weights from crossing back and forth between two codes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import Policy
from jaxq.interpretation.latent import codes_of_leaves
from jaxq.interpretation.transforms import DEFAULT
from jaxq.numbers.blocks import spread
from jaxq.numbers.formats import Integers
from jaxq.numbers.qarray import QArray


def dampening(f: Callable, policy: Policy | Plan = DEFAULT, *, argnums: int = 0) -> Callable[..., jax.Array]:
    """Return a function `(params, *args) -> scalar`: `sum (w^ - clip(w))^2` over all quantized weights.

    w^ is what the weight rounds to, constant to derivatives, so that the term pulls every weight to the middle of its
    code (Nagel et al. 2022, eq. 5); weights beyond the range are left alone. Add it to the loss, times a factor that
    grows with the step. Raises `ValueError` for a weight that is derived from leaves, that has other codes at every
    site it is used at, or that is read in float too, and like `convert`.

    >>> import jax, jax.numpy as jnp, jaxq
    >>> f, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.array([[1.0], [7.0]])}, jnp.ones((1, 2))
    >>> plan = jaxq.make_plan(f, jaxq.weight_only(jaxq.int4()))(params, x)
    >>> float(jaxq.dampening(f, plan)(params, x))
    0.0
    >>> jax.grad(jaxq.dampening(f, plan))({"w": jnp.array([[1.25], [7.0]])}, x)["w"].tolist()
    [[0.5], [0.0]]
    """

    def penalty(*args, **kwargs) -> jax.Array:
        codes = codes_of_leaves(f, policy, argnums, args, kwargs)
        pairs = zip(codes, jax.tree.leaves(args[argnums]), strict=True)
        terms = [jnp.sum(jnp.square(_error(q, x))) for q, x in pairs if q is not None]
        return sum(terms, jnp.float32(0))

    return penalty


def _error(q: QArray, w: Any) -> jax.Array:
    """Return `w - w^`, zero where w is clipped, in float32."""
    error = lax.convert_element_type(w, jnp.float32) - q.decode(jnp.float32)
    if not isinstance(q.format, Integers):
        return error
    # Half a step, and what the rounding of a product adds to it.
    reach = np.float32(0.5 + 2.0**-12) * spread(q.real_scale(), q.shape)
    return jnp.where(lax.abs(error) <= reach, error, 0)
