"""One entry of the zoo, and the seeded arrays that entries are made of.

Every weight is drawn by NumPy from an explicit seed, Flax initialisers are only asked for shapes: the numbers are the
same on every JAX version and nothing is compiled to build a model. Biases, scales and running statistics are moved off
their trivial initial values, since a zero bias hides mistakes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A small program `fn(params, *args)` and what is known about it by hand."""

    name: str
    fn: Callable[..., Any]
    params: Any = dataclasses.field(repr=False)
    args: tuple[Any, ...] = dataclasses.field(repr=False)
    sites: int
    reverse: bool = True


def normal(seed: int, *shape: int, scale: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """Draw normal data of mean zero and this standard deviation."""
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def weight(seed: int, *shape: int, fan_in: int | None = None, dtype: Any = jnp.float32) -> jax.Array:
    """Draw a weight of variance 1 / fan_in; fan_in is the product of all axes but the last unless given."""
    return normal(seed, *shape, scale=float(fan_in or np.prod(shape[:-1])) ** -0.5, dtype=dtype)


def dense(seed: int, features_in: int, features_out: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Draw {kernel [in, out], bias [out]}."""
    kernel = weight(seed, features_in, features_out, dtype=dtype)
    return {"kernel": kernel, "bias": normal(seed + 1000, features_out, scale=0.1, dtype=dtype)}


def affine(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """x @ kernel + bias."""
    return x @ layer["kernel"] + jnp.expand_dims(layer["bias"], range(x.ndim - 1))


def drawn(shapes: Any) -> Any:
    """Replace every ShapeDtypeStruct of a Flax tree by numbers that suit its name."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    return treedef.unflatten([_drawn_leaf(seed, path, leaf) for seed, (path, leaf) in enumerate(leaves)])


def _drawn_leaf(seed: int, path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if "kernel" in names or "embedding" in names:
        return weight(seed, *leaf.shape, dtype=leaf.dtype)
    if "scale" in names or "var" in names:
        return jnp.asarray(np.random.default_rng(seed).uniform(0.8, 1.2, leaf.shape), leaf.dtype)
    return normal(seed, *leaf.shape, scale=0.1, dtype=leaf.dtype)


def linen(name: str, module: Any, *args: jax.Array, sites: int) -> Model:
    """Enter a Flax Linen module called as `module.apply(variables, *args)`."""

    def fn(variables, *args):
        return module.apply(variables, *args)

    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return Model(name, fn, drawn(shapes), args, sites)


def nnx_module(name: str, build: Callable[[nnx.Rngs], Any], *args: jax.Array, sites: int) -> Model:
    """Enter a Flax NNX module, itself the first argument of `fn`."""

    def fn(module, *args):
        return module(*args)

    return Model(name, fn, drawn(nnx.eval_shape(build, nnx.Rngs(0))), args, sites)
