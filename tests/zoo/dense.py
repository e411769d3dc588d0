"""Models of dense layers: where the weight stands, what it is derived from, what wraps the call."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from .entry import Model, affine, dense, linen, nnx_module, normal, weight


def mlp() -> Model:
    """Three layers in a dict."""

    def fn(params, x):
        h = jax.nn.relu(affine(params["up"], x))
        h = jax.nn.relu(affine(params["mid"], h))
        return affine(params["head"], h)

    params = {"up": dense(0, 16, 32), "mid": dense(1, 32, 32), "head": dense(2, 32, 10)}
    return Model("mlp", fn, params, (normal(3, 8, 16),), sites=3)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["activation"])
@dataclasses.dataclass(frozen=True)
class _Linear:
    """`activation(W @ x + b)` for one example x: [in], with W: [out, in]; the activation is static."""

    weight: jax.Array
    bias: jax.Array
    activation: Callable[[jax.Array], jax.Array]

    def __call__(self, x):
        return self.activation(self.weight @ x + self.bias)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Sequential:
    """A tuple of layers, called in order."""

    layers: tuple[_Linear, ...]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def _identity(x: jax.Array) -> jax.Array:
    return x


def lhs_weight() -> Model:
    """A module that is a pytree with a static field, vmapped over examples: the weight is the left operand."""

    def fn(module, x):
        return jax.vmap(module)(x)

    first = _Linear(weight(0, 32, 16, fan_in=16), normal(1, 32, scale=0.1), jnp.tanh)
    second = _Linear(weight(2, 10, 32, fan_in=32), normal(3, 10, scale=0.1), _identity)
    return Model("lhs_weight", fn, _Sequential((first, second)), (normal(4, 8, 16),), sites=2)


class _NnxMlp(nnx.Module):
    """Two linear layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.up(x)))


def nnx_mlp() -> Model:
    """Two NNX linear layers."""
    return nnx_module("nnx_mlp", _NnxMlp, normal(1, 8, 16), sites=2)


class _LinenMlp(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, name="head")(nn.relu(nn.Dense(32, name="up")(x)))


def linen_vmap() -> Model:
    """An ensemble of four: nn.vmap over the weights [4, ...], the input shared."""
    ensemble = nn.vmap(
        _LinenMlp, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=4
    )
    return linen("linen_vmap", ensemble(), normal(0, 8, 16), sites=2)


def nnx_vmap() -> Model:
    """An ensemble of four: nnx.vmap over the weights [4, ...] inside, the input shared."""

    @nnx.vmap(in_axes=(0, None))
    def call(member, x):
        return member(x)

    def build(rngs):
        return nnx.vmap(_NnxMlp)(rngs.split(4))

    model = nnx_module("nnx_vmap", build, normal(1, 8, 16), sites=2)
    return dataclasses.replace(model, fn=call)


def lora() -> Model:
    """x @ (kernel + a @ b), twice: the products a @ b are of weights only and are not sites."""

    def fn(params, x):
        h = jax.nn.relu(x @ merged(params["up"]))
        return h @ merged(params["head"])

    def merged(layer):
        return layer["kernel"] + layer["a"] @ layer["b"]

    def layer(seed, features_in, features_out):
        a, b = weight(seed + 1, features_in, 2), weight(seed + 2, 2, features_out)
        return {"kernel": weight(seed, features_in, features_out), "a": a, "b": b}

    params = {"up": layer(0, 16, 32), "head": layer(10, 32, 10)}
    return Model("lora", fn, params, (normal(20, 8, 16),), sites=2)


def weight_norm() -> Model:
    """x @ (g * v / |v|) + bias, the norm per output channel, twice."""

    def fn(params, x):
        return normed(params["head"], jax.nn.relu(normed(params["up"], x)))

    def normed(layer, x):
        length = jnp.sqrt(jnp.sum(layer["v"] ** 2, axis=0, keepdims=True))
        return affine({"kernel": layer["v"] * (layer["g"][None, :] / length), "bias": layer["bias"]}, x)

    def layer(seed, features_in, features_out):
        drawn = dense(seed, features_in, features_out)
        return {"v": drawn["kernel"], "g": 1 + normal(seed + 1, features_out, scale=0.1), "bias": drawn["bias"]}

    params = {"up": layer(0, 16, 32), "head": layer(10, 32, 10)}
    return Model("weight_norm", fn, params, (normal(20, 8, 16),), sites=2)


def _typed_mlp(name: str, dtype: Any) -> Model:
    """Two layers whose weights, data and output are of one dtype."""

    def fn(params, x):
        return affine(params["head"], jax.nn.relu(affine(params["up"], x)))

    params = {"up": dense(0, 16, 32, dtype), "head": dense(1, 32, 10, dtype)}
    return Model(name, fn, params, (normal(2, 8, 16, dtype=dtype),), sites=2)


def bfloat16_mlp() -> Model:
    """Two layers in bfloat16."""
    return _typed_mlp("bfloat16_mlp", jnp.bfloat16)


def float16_mlp() -> Model:
    """Two layers in float16."""
    return _typed_mlp("float16_mlp", jnp.float16)


def einsum3() -> Model:
    """A bilinear form by one three-operand einsum: x W, then (x W) y, a product of activations; and a head."""

    def fn(params, x, y):
        h = jnp.einsum("bi,ijo,bj->bo", x, params["form"]["kernel"], y)
        return affine(params["head"], jnp.tanh(h))

    params = {"form": {"kernel": weight(0, 16, 12, 8)}, "head": dense(1, 8, 10)}
    return Model("einsum3", fn, params, (normal(2, 8, 16), normal(3, 8, 12)), sites=3)


def jit_helper() -> Model:
    """An inner jax.jit called twice with the same weight."""

    @jax.jit
    def layer(weights, x):
        return jnp.tanh(affine(weights, x))

    def fn(params, x):
        return affine(params["head"], layer(params["shared"], layer(params["shared"], x)))

    params = {"shared": dense(0, 16, 16), "head": dense(1, 16, 10)}
    return Model("jit_helper", fn, params, (normal(2, 8, 16),), sites=3)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["logits", "label", "aux"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Prediction:
    """What `structured_io` returns: float logits, integer labels, nothing."""

    logits: jax.Array
    label: jax.Array
    aux: None


def structured_io() -> Model:
    """A dict in (floats and an integer mask), a dataclass with an integer and a None leaf out."""

    def fn(params, batch):
        x = jnp.where(batch["mask"][:, None] > 0, batch["x"], jnp.float32(0))
        logits = affine(params["head"], jax.nn.relu(affine(params["up"], x)))
        return Prediction(logits, jnp.argmax(logits, axis=-1), None)

    params = {"up": dense(0, 16, 32), "head": dense(1, 32, 10)}
    batch = {"x": normal(2, 8, 16), "mask": jnp.array([1, 1, 0, 1, 1, 1, 1, 0], jnp.int32)}
    return Model("structured_io", fn, params, (batch,), sites=2)


BUILDERS = (
    mlp,
    lhs_weight,
    nnx_mlp,
    linen_vmap,
    nnx_vmap,
    lora,
    weight_norm,
    bfloat16_mlp,
    float16_mlp,
    einsum3,
    jit_helper,
    structured_io,
)
