"""Models of the benchmarks: plain JAX functions over nested dictionaries of arrays.

Each is a `Model` with an init, an apply, an example batch and a loss. Products go through `lax.dot_general`,
`lax.conv_general_dilated` and `jnp.einsum`, which every quantizer of JAX programs understands. Nothing is allocated at
import; under `jax.eval_shape` nothing is allocated at all.
"""

import functools
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Params = dict[str, Any]

MLP_WIDTHS = (1024, 1024, 1024, 1024, 10)
STEM, RESNET_WIDTHS = 64, (64, 128, 256, 512)
WIDTH, HEADS, FFN = 384, 12, 1536
DECODER_WIDTH, DECODER_HEADS, DECODER_FFN, DECODER_LAYERS = 1024, 16, 4096, 2
LSTM_WIDTH, LSTM_STEPS, LSTM_BATCH = 256, 32, 16
# Expansion, channels, blocks, first stride (Sandler et al. 2018, table 2), at half the width.
MOBILENET = ((1, 8, 1, 1), (6, 16, 2, 2), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
MOBILENET_STEM, MOBILENET_LAST = 16, 1280
CLASSES = 10


class Model(NamedTuple):
    """A network and what it takes to run and train it."""

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array], jax.Array]
    example_input: Callable[[jax.Array], jax.Array]
    example_target: Callable[[jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]


def training_step(predict: Callable, model: Model, rate: float) -> Callable:
    """Return a compiled step: loss, gradient and SGD update at a learning `rate`, the weights donated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(params: Any, x: jax.Array, target: jax.Array) -> tuple[Any, jax.Array]:
        loss, gradient = jax.value_and_grad(lambda p: model.loss(predict(p, x), target))(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient), loss

    return step


def trained(step: Callable, params: Any, x: jax.Array, target: jax.Array) -> Callable[[], Any]:
    """Return a call that takes the next step of one training run."""

    def steps() -> Iterator[Any]:
        weights = jax.tree.map(jnp.copy, params)
        while True:
            weights, loss = step(weights, x, target)
            yield weights, loss

    return steps().__next__


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean softmax cross-entropy; logits: [n, classes], labels: [n]."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -jnp.mean(chosen)


def mean_square(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the mean squared difference."""
    return jnp.mean(jnp.square(outputs - targets))


def _weight(key: jax.Array, shape: tuple[int, ...], fan_in: int, gain: float = 2.0) -> jax.Array:
    return jax.random.normal(key, shape) * math.sqrt(gain / fan_in)


def _along_last(vector: jax.Array, ndim: int) -> jax.Array:
    return jnp.reshape(vector, (1,) * (ndim - vector.ndim) + vector.shape)


# Dense layers


def _dense_init(key: jax.Array, n_in: int, n_out: int) -> Params:
    return {"kernel": _weight(key, (n_in, n_out), n_in), "bias": jnp.zeros(n_out)}


def _dense(params: Params, x: jax.Array) -> jax.Array:
    y = lax.dot_general(x, params["kernel"], (((x.ndim - 1,), (0,)), ((), ())))
    return y + _along_last(params["bias"], y.ndim)


def mlp_init(key: jax.Array) -> Params:
    """Return the weights of an MLP 1024-1024-1024-1024-10."""
    keys = jax.random.split(key, len(MLP_WIDTHS) - 1)
    return {
        f"dense{i}": _dense_init(k, *sizes) for i, (k, sizes) in enumerate(zip(keys, pairwise(MLP_WIDTHS), strict=True))
    }


def mlp_apply(params: Params, x: jax.Array) -> jax.Array:
    """Run the MLP: [n, 1024] to [n, 10]."""
    *hidden, last = sorted(params)
    for name in hidden:
        x = jax.nn.relu(_dense(params[name], x))
    return _dense(params[last], x)


# ResNet-18 for 32x32 images, without batch normalization


def _conv_init(key: jax.Array, size: int, n_in: int, n_out: int, *, gain: float = 2.0) -> Params:
    fan_in = size * size * n_in
    return {"kernel": _weight(key, (size, size, n_in, n_out), fan_in, gain), "bias": jnp.zeros(n_out)}


def _conv(params: Params, x: jax.Array, stride: int = 1) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, params["kernel"], (stride, stride), "SAME", dimension_numbers=layout)
    return y + _along_last(params["bias"], y.ndim)


def _block_init(key: jax.Array, n_in: int, n_out: int) -> Params:
    first, second, third = jax.random.split(key, 3)
    # A small second gain stands in for normalization: activations keep their size through the sums.
    block = {"conv1": _conv_init(first, 3, n_in, n_out), "conv2": _conv_init(second, 3, n_out, n_out, gain=0.1)}
    if n_in != n_out:
        block["projection"] = _conv_init(third, 1, n_in, n_out, gain=1.0)
    return block


def _block(params: Params, x: jax.Array) -> jax.Array:
    stride = 2 if "projection" in params else 1
    y = jax.nn.relu(_conv(params["conv1"], x, stride))
    shortcut = _conv(params["projection"], x, stride) if "projection" in params else x
    return jax.nn.relu(_conv(params["conv2"], y) + shortcut)


def resnet18_init(key: jax.Array) -> Params:
    """Return the weights: 3x3 stem with 64 channels, 4 stages of 2 basic blocks, a dense head."""
    stem, head, *keys = jax.random.split(key, 2 + 2 * len(RESNET_WIDTHS))
    inputs = [w for pair in pairwise((STEM, *RESNET_WIDTHS)) for w in pair]
    outputs = [w for w in RESNET_WIDTHS for _ in range(2)]
    blocks = zip(keys, inputs, outputs, strict=True)
    params = {f"block{i}": _block_init(k, n_in, n_out) for i, (k, n_in, n_out) in enumerate(blocks)}
    return {"stem": _conv_init(stem, 3, 3, STEM), **params, "head": _dense_init(head, RESNET_WIDTHS[-1], CLASSES)}


def resnet18_apply(params: Params, x: jax.Array) -> jax.Array:
    """Run the ResNet: [n, 32, 32, 3] to [n, 10]."""
    x = jax.nn.relu(_conv(params["stem"], x))
    for index in range(2 * len(RESNET_WIDTHS)):
        x = _block(params[f"block{index}"], x)
    return _dense(params["head"], jnp.mean(x, axis=(1, 2)))


# Transformer encoder


def _norm_init(width: int) -> Params:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _norm(params: Params, x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    y = centred * lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)
    return y * _along_last(params["scale"], x.ndim) + _along_last(params["bias"], x.ndim)


def _attention_init(key: jax.Array, width: int, heads: int) -> Params:
    *keys, last = jax.random.split(key, 4)
    split = (heads, width // heads)
    inputs = {
        name: {"kernel": _weight(k, (width, *split), width, 1.0), "bias": jnp.zeros(split)}
        for name, k in zip(("query", "key", "value"), keys, strict=True)
    }
    return {**inputs, "out": {"kernel": _weight(last, (*split, width), width, 1.0), "bias": jnp.zeros(width)}}


def _project(params: Params, x: jax.Array, spec: str) -> jax.Array:
    y = jnp.einsum(spec, x, params["kernel"])
    return y + _along_last(params["bias"], y.ndim)


def _attention(params: Params, x: jax.Array) -> jax.Array:
    query, key, value = (_project(params[name], x, "btd,dhk->bthk") for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhk,bshk->bhqs", query, key) * query.shape[-1] ** -0.5
    mixed = jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores), value)
    return _project(params["out"], mixed, "bqhk,hkd->bqd")


def _layer_init(key: jax.Array, width: int, heads: int, ffn: int) -> Params:
    attention, up, down = jax.random.split(key, 3)
    return {
        "norm1": _norm_init(width),
        "attention": _attention_init(attention, width, heads),
        "norm2": _norm_init(width),
        "up": _dense_init(up, width, ffn),
        "down": _dense_init(down, ffn, width),
    }


def _layer(params: Params, x: jax.Array) -> jax.Array:
    x = x + _attention(params["attention"], _norm(params["norm1"], x))
    return x + _dense(params["down"], jax.nn.gelu(_dense(params["up"], _norm(params["norm2"], x))))


def encoder_init(key: jax.Array, layers: int = 6) -> Params:
    """Return the weights of an encoder of width 384, with 12 heads and feed-forward width 1536."""
    return stack_init(key, layers, WIDTH, HEADS, FFN)


def stack_init(key: jax.Array, layers: int, width: int, heads: int, ffn: int) -> Params:
    """Return the weights of layers of attention and feed-forward, and of a last normalization."""
    keys = jax.random.split(key, layers)
    return {**{f"layer{i}": _layer_init(k, width, heads, ffn) for i, k in enumerate(keys)}, "norm": _norm_init(width)}


def stack_apply(params: Params, x: jax.Array) -> jax.Array:
    """Run the layers, unrolled, normalization first: [b, t, width] to [b, t, width]."""
    for index in range(len(params) - 1):
        x = _layer(params[f"layer{index}"], x)
    return _norm(params["norm"], x)


def _deep_init(key: jax.Array) -> Params:
    return encoder_init(key, layers=48)


# Decoder, its first step: one token, which sees itself alone


def decoder_init(key: jax.Array) -> Params:
    """Return the weights of a decoder of width 1024, with 16 heads and feed-forward width 4096."""
    return stack_init(key, DECODER_LAYERS, DECODER_WIDTH, DECODER_HEADS, DECODER_FFN)


# MobileNetV2 at half the width, without batch normalization (Sandler et al. 2018)


def _depthwise_init(key: jax.Array, channels: int) -> Params:
    return {"kernel": _weight(key, (3, 3, 1, channels), 9), "bias": jnp.zeros(channels)}


def _depthwise(params: Params, x: jax.Array, stride: int) -> jax.Array:
    layout, groups = ("NHWC", "HWIO", "NHWC"), x.shape[-1]
    strides = (stride, stride)
    y = lax.conv_general_dilated(
        x, params["kernel"], strides, "SAME", dimension_numbers=layout, feature_group_count=groups
    )
    return y + _along_last(params["bias"], y.ndim)


def bottlenecks() -> list[tuple[int, int, int, int]]:
    """Return (inputs, channels inside, outputs, stride) of every block."""
    blocks, inputs = [], MOBILENET_STEM
    for expansion, outputs, count, first in MOBILENET:
        for index in range(count):
            blocks.append((inputs, inputs * expansion, outputs, first if index == 0 else 1))
            inputs = outputs
    return blocks


def _bottleneck_init(key: jax.Array, inputs: int, inside: int, outputs: int) -> Params:
    first, second, third = jax.random.split(key, 3)
    block = {"depthwise": _depthwise_init(second, inside), "project": _conv_init(third, 1, inside, outputs, gain=1.0)}
    return {"expand": _conv_init(first, 1, inputs, inside), **block} if inside != inputs else block


def _bottleneck(params: Params, x: jax.Array, stride: int) -> jax.Array:
    y = jax.nn.relu6(_conv(params["expand"], x)) if "expand" in params else x
    y = _conv(params["project"], jax.nn.relu6(_depthwise(params["depthwise"], y, stride)))
    return x + y if x.shape == y.shape else y


def mobilenet_init(key: jax.Array) -> Params:
    """Return the weights of MobileNetV2 0.5 with ten classes."""
    stem, last, head, *keys = jax.random.split(key, 3 + len(bottlenecks()))
    pairs = zip(keys, bottlenecks(), strict=True)
    blocks = {f"block{i}": _bottleneck_init(k, *sizes[:3]) for i, (k, sizes) in enumerate(pairs)}
    ends = {"stem": _conv_init(stem, 3, 3, MOBILENET_STEM), "last": _conv_init(last, 1, 160, MOBILENET_LAST)}
    return {**ends, **blocks, "head": _dense_init(head, MOBILENET_LAST, CLASSES)}


def mobilenet_apply(params: Params, x: jax.Array) -> jax.Array:
    """Run the MobileNet: [n, 96, 96, 3] to [n, 10]."""
    x = jax.nn.relu6(_conv(params["stem"], x, 2))
    for index, (*_, stride) in enumerate(bottlenecks()):
        x = _bottleneck(params[f"block{index}"], x, stride)
    return _dense(params["head"], jnp.mean(jax.nn.relu6(_conv(params["last"], x)), axis=(1, 2)))


# LSTM


def lstm_init(key: jax.Array) -> Params:
    """Return the weights of an LSTM of width 256 and a dense head."""
    gates, head = jax.random.split(key)
    return {"gates": _dense_init(gates, 2 * LSTM_WIDTH, 4 * LSTM_WIDTH), "head": _dense_init(head, LSTM_WIDTH, CLASSES)}


def lstm_apply(params: Params, x: jax.Array) -> jax.Array:
    """Run the LSTM: [n, t, 256] to [n, 10], one product for all gates at every step."""

    def step(state: tuple[jax.Array, jax.Array], now: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        cell, hidden = state
        gates = _dense(params["gates"], jnp.concatenate([now, hidden], axis=-1))
        into, forget, new, out = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(into) * jnp.tanh(new)
        return (cell, jax.nn.sigmoid(out) * jnp.tanh(cell)), None

    zeros = jnp.zeros((x.shape[0], LSTM_WIDTH), x.dtype)
    (_, hidden), _ = lax.scan(step, (zeros, zeros), jnp.moveaxis(x, 1, 0))
    return _dense(params["head"], hidden)


def _normal(*shape: int) -> Callable[[jax.Array], jax.Array]:
    return lambda key: jax.random.normal(key, shape)


def _labels(count: int) -> Callable[[jax.Array], jax.Array]:
    return lambda key: jax.random.randint(key, (count,), 0, CLASSES)


_TOKENS = _normal(4, 128, WIDTH)
_TOKEN = _normal(1, 1, DECODER_WIDTH)

MODELS = {
    "mlp": Model(mlp_init, mlp_apply, _normal(128, 1024), _labels(128), cross_entropy),
    "resnet18": Model(resnet18_init, resnet18_apply, _normal(8, 32, 32, 3), _labels(8), cross_entropy),
    "encoder": Model(encoder_init, stack_apply, _TOKENS, _TOKENS, mean_square),
    "mobilenet": Model(mobilenet_init, mobilenet_apply, _normal(8, 96, 96, 3), _labels(8), cross_entropy),
    "decoder": Model(decoder_init, stack_apply, _TOKEN, _TOKEN, mean_square),
    "lstm": Model(lstm_init, lstm_apply, _normal(LSTM_BATCH, LSTM_STEPS, LSTM_WIDTH), _labels(16), cross_entropy),
}

# Only ever traced: 48 unrolled layers, 384 products.
DEEP = Model(_deep_init, stack_apply, _TOKENS, _TOKENS, mean_square)
