"""Models whose sites stand inside another primitive: loops, branches, custom rules, checkpoints, meshes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from .attention import WIDTH, LinenBlock
from .entry import Model, affine, dense, linen, normal, weight


def _stacked(seed: int, length: int, features: int) -> dict[str, jax.Array]:
    """Draw `length` dense layers as {kernel [L, n, n], bias [L, n]}."""
    layers = [dense(seed + i, features, features) for i in range(length)]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *layers)


class _ScanBlock(nn.Module):
    """A transformer block as a scan body."""

    @nn.compact
    def __call__(self, x, _):
        return LinenBlock(name="block")(x), None


class _ScanRemat(nn.Module):
    """Three rematerialised blocks under nn.scan, weights [3, ...], and a head."""

    @nn.compact
    def __call__(self, x):
        body = nn.remat(_ScanBlock, prevent_cse=False)
        layers = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(10, name="head")(jnp.mean(x, axis=1))


def scan_remat() -> Model:
    """nn.scan over nn.remat: a body of 8, a head."""
    return linen("scan_remat", _ScanRemat(), normal(0, 8, 6, WIDTH), sites=9)


def scan_xs() -> Model:
    """lax.scan with weights [3, ...] as xs: two dots in the body, a head."""

    def body(x, layer):
        return x + affine(layer["down"], jax.nn.relu(affine(layer["up"], x))), None

    def fn(params, x):
        x, _ = lax.scan(body, x, params["layers"])
        return affine(params["head"], x)

    layers = {"up": _stacked(0, 3, 16), "down": _stacked(10, 3, 16)}
    return Model("scan_xs", fn, {"layers": layers, "head": dense(20, 16, 10)}, (normal(30, 8, 16),), sites=3)


def fori_consts() -> Model:
    """fori_loop over weights [3, ...] that are closed over and indexed by the counter: one dot, and a head."""

    def fn(params, x):
        layers = params["layers"]

        def body(i, h):
            return jnp.tanh(affine({"kernel": layers["kernel"][i], "bias": layers["bias"][i]}, h))

        return affine(params["head"], lax.fori_loop(0, 3, body, x))

    params = {"layers": _stacked(0, 3, 16), "head": dense(10, 16, 10)}
    return Model("fori_consts", fn, params, (normal(20, 8, 16),), sites=2)


class _Recurrent(nn.Module):
    """A cell over time and a head on its last output."""

    cell: nn.RNNCellBase

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, name="head")(nn.RNN(self.cell, name="rnn")(x)[:, -1])


def gru() -> Model:
    """Linen GRU: ir, iz, in, hr, hz, hn, and a head."""
    return linen("gru", _Recurrent(nn.GRUCell(16)), normal(0, 8, 5, 12), sites=7)


def lstm() -> Model:
    """Linen OptimizedLSTMCell: one dot by four joined input kernels, one by four recurrent ones, and a head."""
    return linen("lstm", _Recurrent(nn.OptimizedLSTMCell(16)), normal(0, 8, 5, 12), sites=3)


def while_loop() -> Model:
    """A trip count known only from the data (2 or 3), one weight a const of the loop, one in its carry; a head."""

    def fn(params, x):
        def unfinished(carry):
            return carry[0] < 2 + (jnp.sum(x) > 0).astype(jnp.int32)

        def body(carry):
            i, h, mix = carry
            return i + 1, jnp.tanh(affine(params["const"], h) + affine(mix, x)), mix

        _, h, _ = lax.while_loop(unfinished, body, (jnp.int32(0), x, params["carry"]))
        return affine(params["head"], h)

    params = {"const": dense(0, 16, 16), "carry": dense(1, 16, 16), "head": dense(2, 16, 10)}
    return Model("while_loop", fn, params, (normal(3, 8, 16),), sites=3, reverse=False)


def cond() -> Model:
    """A dense layer in each branch of lax.cond, and a head; the predicate reads the input."""

    def fn(params, x):
        def positive(x):
            return jax.nn.relu(affine(params["positive"], x))

        def negative(x):
            return jnp.tanh(affine(params["negative"], x))

        return affine(params["head"], lax.cond(jnp.sum(x) > 0, positive, negative, x))

    params = {"positive": dense(0, 16, 32), "negative": dense(1, 16, 32), "head": dense(2, 32, 10)}
    return Model("cond", fn, params, (normal(3, 8, 16),), sites=3)


def switch() -> Model:
    """Three branches of lax.switch of one, two and no dots, and a head; the index is an argument."""

    def fn(params, x, index):
        def one(x):
            return affine(params["one"], x)

        def two(x):
            return affine(params["two"]["down"], jax.nn.relu(affine(params["two"]["up"], x)))

        def none(x):
            return jnp.sin(x)

        return affine(params["head"], lax.switch(index, (one, two, none), x))

    two = {"up": dense(1, 16, 32), "down": dense(2, 32, 16)}
    params = {"one": dense(0, 16, 16), "two": two, "head": dense(3, 16, 10)}
    return Model("switch", fn, params, (normal(4, 8, 16), jnp.int32(1)), sites=4)


def remat() -> Model:
    """jax.checkpoint around two dots, and a head outside."""

    @jax.checkpoint
    def block(params, x):
        return affine(params["down"], jax.nn.gelu(affine(params["up"], x)))

    def fn(params, x):
        return affine(params["head"], x + block(params["block"], x))

    params = {"block": {"up": dense(0, 16, 32), "down": dense(1, 32, 16)}, "head": dense(2, 16, 10)}
    return Model("remat", fn, params, (normal(3, 8, 16),), sites=3)


def custom_jvp() -> Model:
    """A dot and softplus under custom_jvp, and a head: the rule's own dots are not in the forward program."""

    @jax.custom_jvp
    def soft(kernel, x):
        return jax.nn.softplus(x @ kernel)

    @soft.defjvp
    def _soft_jvp(primals, tangents):
        (kernel, x), (kernel_dot, x_dot) = primals, tangents
        y = x @ kernel
        return jax.nn.softplus(y), jax.nn.sigmoid(y) * (x_dot @ kernel + x @ kernel_dot)

    def fn(params, x):
        return affine(params["head"], soft(params["soft"]["kernel"], x))

    params = {"soft": {"kernel": weight(0, 16, 32)}, "head": dense(1, 32, 10)}
    return Model("custom_jvp", fn, params, (normal(2, 8, 16),), sites=2)


def custom_vjp() -> Model:
    """A dot under custom_vjp whose kernel gradient is twice the true one and whose input gradient is zero."""

    @jax.custom_vjp
    def doubled(kernel, x):
        return x @ kernel

    def forward(kernel, x):
        return x @ kernel, x

    def backward(x, ct):
        return 2 * (x.T @ ct), jnp.zeros_like(x)

    doubled.defvjp(forward, backward)

    def fn(params, x):
        h = doubled(params["doubled"]["kernel"], jnp.tanh(affine(params["up"], x)))
        return affine(params["head"], jax.nn.relu(h))

    params = {"up": dense(0, 16, 16), "doubled": {"kernel": weight(1, 16, 32)}, "head": dense(2, 32, 10)}
    return Model("custom_vjp", fn, params, (normal(3, 8, 16),), sites=3)


def shard_map() -> Model:
    """jax.shard_map over a mesh of one device: a dot split by columns, one by rows with a psum, a head outside."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    columns, rows, whole = PartitionSpec(None, "model"), PartitionSpec("model", None), PartitionSpec()

    def block(up, down, x):
        return lax.psum(jax.nn.relu(x @ up) @ down, "model")

    sharded = jax.shard_map(block, mesh=mesh, in_specs=(columns, rows, whole), out_specs=whole)

    def fn(params, x):
        return affine(params["head"], x + sharded(params["up"]["kernel"], params["down"]["kernel"], x))

    up, down = {"kernel": weight(0, 16, 32)}, {"kernel": weight(1, 32, 16)}
    return Model("shard_map", fn, {"up": up, "down": down, "head": dense(2, 16, 10)}, (normal(3, 8, 16),), sites=3)


BUILDERS = (
    scan_remat,
    scan_xs,
    fori_consts,
    gru,
    lstm,
    while_loop,
    cond,
    switch,
    remat,
    custom_jvp,
    custom_vjp,
    shard_map,
)
