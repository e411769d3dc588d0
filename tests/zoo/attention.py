"""Models of attention, embeddings and routing; one transformer written three times."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from .entry import Model, affine, dense, linen, nnx_module, normal, weight

WIDTH, HEADS, HIDDEN = 16, 2, 32


class LinenBlock(nn.Module):
    """Pre-norm attention (6 sites: query, key, value, qk, pv, out) and a two-layer perceptron (2 sites)."""

    @nn.compact
    def __call__(self, x, mask=None):
        y = nn.LayerNorm(name="ln1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attn")(y, mask=mask)
        y = nn.LayerNorm(name="ln2")(x)
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(HIDDEN, name="up")(y)))


class _Encoder(nn.Module):
    """A learned position table, one block under a causal mask, a head per token."""

    @nn.compact
    def __call__(self, x):
        positions = self.param("positions", nn.initializers.zeros, x.shape[1:], x.dtype)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2], x.dtype), dtype=jnp.bool_)
        x = LinenBlock(name="layer_0")(x + positions[None], mask)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x))


def linen_encoder() -> Model:
    """A block 8, a head 1."""
    return linen("linen_encoder", _Encoder(), normal(0, 8, 6, WIDTH), sites=9)


class NnxBlock(nnx.Module):
    """`LinenBlock` in NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.ln1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(num_heads=HEADS, in_features=WIDTH, decode=False, rngs=rngs)
        self.ln2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.down(nnx.gelu(self.up(self.ln2(x))))


class _NnxTransformer(nnx.Module):
    """Blocks in a list, and a head per token."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([NnxBlock(rngs)])
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def nnx_transformer() -> Model:
    """A block 8, a head 1."""
    return nnx_module("nnx_transformer", _NnxTransformer, normal(1, 8, 6, WIDTH), sites=9)


class _TripleLinen(nn.Module):
    """Two blocks, a norm, the mean over tokens, a head."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = LinenBlock(name=f"block{i}")(x)
        x = jnp.mean(nn.LayerNorm(name="norm")(x), axis=1)
        return nn.Dense(10, name="head")(x)


def triple_linen() -> Model:
    """The transformer of the triple in Linen: two blocks of 8, a head."""
    return linen("triple_linen", _TripleLinen(), normal(0, 8, 6, WIDTH), sites=17)


class _TripleNnx(nnx.Module):
    """`_TripleLinen` in NNX, under the same names."""

    def __init__(self, rngs: nnx.Rngs):
        self.block0 = NnxBlock(rngs)
        self.block1 = NnxBlock(rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        x = self.block1(self.block0(x))
        return self.head(jnp.mean(self.norm(x), axis=1))


def triple_nnx() -> Model:
    """The transformer of the triple in NNX, with the weights of `triple_linen`."""
    source = triple_linen()
    model = nnx_module("triple_nnx", _TripleNnx, *source.args, sites=17)
    nnx.update(model.params, source.params["params"])
    return model


def _layer_norm(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(var + 1e-6) * scale + bias over the last axis."""
    y = jax.nn.standardize(x, axis=-1, epsilon=1e-6)
    return y * layer["scale"][None, None, :] + layer["bias"][None, None, :]


def _heads(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Project [b, s, width] by [width, heads, depth]."""
    return jnp.einsum("bsd,dhk->bshk", x, layer["kernel"]) + layer["bias"][None, None]


def _attend(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Multi-head self-attention, written out."""
    query, key, value = (_heads(params[name], x) for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhk,bshk->bhqs", query / jnp.sqrt(jnp.float32(query.shape[-1])), key)
    mixed = jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores), value)
    return jnp.einsum("bqhk,hkd->bqd", mixed, params["out"]["kernel"]) + params["out"]["bias"][None, None]


def _block(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """`LinenBlock` over a dict."""
    x = x + _attend(params["attn"], _layer_norm(params["ln1"], x))
    return x + affine(params["down"], jax.nn.gelu(affine(params["up"], _layer_norm(params["ln2"], x))))


def triple_plain() -> Model:
    """The transformer of the triple over a dict, with the weights of `triple_linen`."""

    def fn(params, x):
        x = _block(params["block1"], _block(params["block0"], x))
        return affine(params["head"], jnp.mean(_layer_norm(params["norm"], x), axis=1))

    source = triple_linen()
    return Model("triple_plain", fn, source.params["params"], source.args, sites=17)


def dot_product_attention() -> Model:
    """jax.nn.dot_product_attention (2), causal, between four projections."""

    def fn(params, x):
        query, key, value = (_heads(params[name], x) for name in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return affine(params["out"], mixed.reshape(*x.shape[:2], -1))

    def heads(seed):
        return {"kernel": weight(seed, WIDTH, HEADS, 8, fan_in=WIDTH), "bias": normal(seed + 1, HEADS, 8, scale=0.1)}

    params = {"query": heads(0), "key": heads(10), "value": heads(20), "out": dense(30, WIDTH, WIDTH)}
    return Model("dot_product_attention", fn, params, (normal(40, 8, 6, WIDTH),), sites=6)


class _Tied(nn.Module):
    """An embedding table used to look up and to decode."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(32, WIDTH, name="embed")
        return embed.attend(nn.tanh(nn.Dense(WIDTH, name="mid")(embed(tokens))))


def tied_embedding() -> Model:
    """A lookup, a dense layer, the table again as decoder."""
    tokens = jnp.arange(48, dtype=jnp.int32).reshape(8, 6) * 7 % 32
    return linen("tied_embedding", _Tied(), tokens, sites=3)


def moe_ragged() -> Model:
    """Route each token to one of four experts: the router (1) and two lax.ragged_dot (2) over sorted tokens."""

    def fn(params, x):
        gates = jax.nn.softmax(affine(params["router"], x))
        expert = jnp.argmax(gates, axis=-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=4).astype(jnp.int32)
        h = jax.nn.relu(lax.ragged_dot(x[order], params["up"]["kernel"], sizes))
        y = lax.ragged_dot(h, params["down"]["kernel"], sizes)
        return y[jnp.argsort(order)] * jnp.max(gates, axis=-1, keepdims=True)

    up, down = weight(1, 4, WIDTH, HIDDEN, fan_in=WIDTH), weight(2, 4, HIDDEN, WIDTH, fan_in=HIDDEN)
    params = {"router": dense(0, WIDTH, 4), "up": {"kernel": up}, "down": {"kernel": down}}
    return Model("moe_ragged", fn, params, (normal(3, 16, WIDTH),), sites=3)


BUILDERS = (
    linen_encoder,
    nnx_transformer,
    triple_linen,
    triple_nnx,
    triple_plain,
    dot_product_attention,
    tied_embedding,
    moe_ragged,
)
