"""Products large enough to fill an accelerator: int8 against bfloat16, which is what such a device multiplies fastest.

A CPU takes seconds for each of these, so `bench.py` runs them there only when asked for by name.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

import timing
from bench_models import Model, Params, mean_square, stack_apply, stack_init
from bench_tables import Row, Settings, Table, speed_up
from variants import call_of

SIDE = 8192
# The encoder: width, heads, feed-forward width, layers; sentences and tokens.
WIDTH, HEADS, FFN, LAYERS = 4096, 32, 16384, 2
SENTENCES, TOKENS = 8, 512
IMAGES = 128
STATIC, DYNAMIC = "int8 static", "int8 dynamic"
NHWC = ("NHWC", "HWIO", "NHWC")

# Image size, kernel size, channels in and out, stride, groups: shapes of ResNet-50, and what cuDNN is slow at.
CONVOLUTIONS = (
    (224, 7, 3, 64, 2, 1),
    (56, 3, 64, 64, 1, 1),
    (56, 1, 256, 64, 1, 1),
    (28, 3, 128, 128, 1, 1),
    (14, 3, 256, 256, 1, 1),
    (14, 1, 1024, 256, 1, 1),
    (7, 3, 512, 512, 1, 1),
    (56, 3, 128, 128, 2, 1),
    (28, 3, 256, 256, 1, 8),
    (56, 3, 128, 128, 1, 128),
)


def _product(weight: jax.Array, x: jax.Array) -> jax.Array:
    return x @ weight


def _convolution(stride: int, groups: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def convolve(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=NHWC, feature_group_count=groups
        )

    return convolve


def _shaped(apply: Callable, weight: Sequence[int], data: Sequence[int]) -> Model:
    def normal(shape: Sequence[int]) -> Callable[[jax.Array], jax.Array]:
        return lambda key: jax.random.normal(key, shape, jnp.bfloat16)

    return Model(normal(weight), apply, normal(data), normal(data), mean_square)


def _encoder() -> Model:
    def init(key: jax.Array) -> Params:
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), stack_init(key, LAYERS, WIDTH, HEADS, FFN))

    def tokens(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (SENTENCES, TOKENS, WIDTH), jnp.bfloat16)

    return Model(init, stack_apply, tokens, tokens, mean_square)


def models() -> dict[str, Model]:
    """Return the programs, all in bfloat16."""
    square = (SIDE, SIDE)
    found = {f"dot {SIDE}^3": _shaped(_product, square, square), f"encoder, width {WIDTH}": _encoder()}
    for image, size, inputs, outputs, stride, groups in CONVOLUTIONS:
        name = f"conv {size}x{size}/{stride}, {image}x{image}x{inputs} to {outputs}"
        name += f", {groups} groups" if groups > 1 else ""
        kernel, data = (size, size, inputs // groups, outputs), (IMAGES, image, image, inputs)
        found[name] = _shaped(_convolution(stride, groups), kernel, data)
    return found


def large(settings: Settings) -> Table:
    """Measure large products and convolutions in int8, against bfloat16."""
    rows: list[Row] = []
    for name, model in models().items():
        weights, data = jax.random.split(jax.random.key(0))
        params, x = model.init(weights), model.example_input(data)
        calls = {"bfloat16": functools.partial(jax.jit(model.apply), params, x)}
        calls |= {variant: call_of(model, variant, params, x) for variant in (STATIC, DYNAMIC)}
        blocks = timing.interleave(calls, rounds=settings.rounds, block=settings.block)
        rows += [speed_up(name, variant, blocks, "bfloat16") for variant in (STATIC, DYNAMIC)]
    return Table("Large products", "bfloat16 time / time (more is better)", "bfloat16", rows)
