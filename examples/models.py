"""Small image classifiers, each in Flax Linen and in Flax NNX, with the same parameter paths and the same maths.

`conv_0/kernel` is `params/conv_0/kernel` among the Linen variables and `conv_0.kernel` in the NNX module, so that a
policy written for one holds for the other. Every model is called as `model(x, train=False)` on images
[n, height, width, channels] and returns logits [n, n_classes].
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

MLP_WIDTHS = (256, 128)
CNN_WIDTHS = (16, 32, 64)
RESNET_STAGES = ((16, 1), (32, 2), (64, 2))  # channels, stride
STEM = 16
DIM, HEADS, HIDDEN, DEPTH = 64, 4, 128, 2
MOMENTUM = 0.9  # of the BatchNorm statistics: short trainings need quick ones
KERNEL = (3, 3)

Shape = tuple[int, int, int]


def patch_side(shape: Shape) -> int:
    """Patches of 4x4 pixels, of 2x2 for images as small as 8x8."""
    return 4 if shape[0] >= 16 else 2


def pool(x: jax.Array) -> jax.Array:
    """Means of 2x2 pixels: as accurate here as maxima, and their gradient is much faster on a CPU."""
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


def spatial_mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=(1, 2))


# --- Linen -----------------------------------------------------------------------------------------------------------


class LinenMLP(nn.Module):
    """Two hidden layers."""

    n_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        x = x.reshape(len(x), -1)
        for i, width in enumerate(MLP_WIDTHS):
            x = nn.relu(nn.Dense(width, name=f"dense_{i}")(x))
        return nn.Dense(self.n_classes, name="head")(x)


class LinenCNN(nn.Module):
    """Three times conv, BatchNorm, relu, with pooling between them; 55 k parameters on 28x28 pixels."""

    n_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i, width in enumerate(CNN_WIDTHS):
            x = pool(x) if i else x
            x = nn.Conv(width, KERNEL, use_bias=False, name=f"conv_{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, name=f"bn_{i}")(x))
        return nn.Dense(self.n_classes, name="head")(x.reshape(len(x), -1))


class LinenResidual(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), after He et al. 2015, figure 2."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        strides = (self.stride, self.stride)
        y = nn.Conv(self.width, KERNEL, strides, use_bias=False, name="conv_0")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, name="bn_0")(y))
        y = nn.Conv(self.width, KERNEL, use_bias=False, name="conv_1")(y)
        y = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, name="bn_1")(y)
        if x.shape != y.shape:
            x = nn.Conv(self.width, (1, 1), strides, name="shortcut")(x)
        return nn.relu(x + y)


class LinenResNet(nn.Module):
    """ResNet-8 for small images."""

    n_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(STEM, KERNEL, use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, name="bn")(x))
        for i, (width, stride) in enumerate(RESNET_STAGES):
            x = LinenResidual(width, stride, name=f"block_{i}")(x, train)
        return nn.Dense(self.n_classes, name="head")(spatial_mean(x))


class LinenBlock(nn.Module):
    """x + attn(ln(x)), then x + mlp(ln(x))."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attn")(nn.LayerNorm(name="ln_0")(x))
        y = nn.gelu(nn.Dense(HIDDEN, name="up")(nn.LayerNorm(name="ln_1")(x)))
        return x + nn.Dense(DIM, name="down")(y)


class LinenTransformer(nn.Module):
    """Patches as tokens, learned positions, the mean over the tokens at the end."""

    n_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        side = patch_side(x.shape[1:])
        x = nn.Conv(DIM, (side, side), (side, side), name="patches")(x).reshape(len(x), -1, DIM)
        x = x + self.param("positions", nn.initializers.normal(1.0), x.shape[1:])[None]
        for i in range(DEPTH):
            x = LinenBlock(name=f"block_{i}")(x)
        return nn.Dense(self.n_classes, name="head")(nn.LayerNorm(name="ln")(x).mean(axis=1))


# --- NNX -------------------------------------------------------------------------------------------------------------


class NnxMLP(nnx.Module):
    """Two hidden layers."""

    def __init__(self, shape: Shape, n_classes: int, rngs: nnx.Rngs):
        sizes = (math.prod(shape), *MLP_WIDTHS)
        for i, (size, width) in enumerate(zip(sizes, MLP_WIDTHS, strict=False)):
            setattr(self, f"dense_{i}", nnx.Linear(size, width, rngs=rngs))
        self.head = nnx.Linear(sizes[-1], n_classes, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        x = x.reshape(len(x), -1)
        for i in range(len(MLP_WIDTHS)):
            x = nnx.relu(getattr(self, f"dense_{i}")(x))
        return self.head(x)


class NnxCNN(nnx.Module):
    """Three times conv, BatchNorm, relu, with pooling between them; 55 k parameters on 28x28 pixels."""

    def __init__(self, shape: Shape, n_classes: int, rngs: nnx.Rngs):
        sizes = (shape[-1], *CNN_WIDTHS)
        for i, (size, width) in enumerate(zip(sizes, CNN_WIDTHS, strict=False)):
            setattr(self, f"conv_{i}", nnx.Conv(size, width, KERNEL, use_bias=False, rngs=rngs))
            setattr(self, f"bn_{i}", nnx.BatchNorm(width, momentum=MOMENTUM, rngs=rngs))
        shrunk = 2 ** (len(CNN_WIDTHS) - 1)
        self.head = nnx.Linear(shape[0] // shrunk * (shape[1] // shrunk) * sizes[-1], n_classes, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i in range(len(CNN_WIDTHS)):
            x = getattr(self, f"conv_{i}")(pool(x) if i else x)
            x = nnx.relu(getattr(self, f"bn_{i}")(x, use_running_average=not train))
        return self.head(x.reshape(len(x), -1))


class NnxResidual(nnx.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), after He et al. 2015, figure 2."""

    def __init__(self, size: int, width: int, stride: int, rngs: nnx.Rngs):
        strides = (stride, stride)
        self.conv_0 = nnx.Conv(size, width, KERNEL, strides, use_bias=False, rngs=rngs)
        self.bn_0 = nnx.BatchNorm(width, momentum=MOMENTUM, rngs=rngs)
        self.conv_1 = nnx.Conv(width, width, KERNEL, use_bias=False, rngs=rngs)
        self.bn_1 = nnx.BatchNorm(width, momentum=MOMENTUM, rngs=rngs)
        same = size == width and stride == 1
        self.shortcut = None if same else nnx.Conv(size, width, (1, 1), strides, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = nnx.relu(self.bn_0(self.conv_0(x), use_running_average=not train))
        y = self.bn_1(self.conv_1(y), use_running_average=not train)
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class NnxResNet(nnx.Module):
    """ResNet-8 for small images."""

    def __init__(self, shape: Shape, n_classes: int, rngs: nnx.Rngs):
        self.stem = nnx.Conv(shape[-1], STEM, KERNEL, use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(STEM, momentum=MOMENTUM, rngs=rngs)
        size = STEM
        for i, (width, stride) in enumerate(RESNET_STAGES):
            setattr(self, f"block_{i}", NnxResidual(size, width, stride, rngs))
            size = width
        self.head = nnx.Linear(size, n_classes, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nnx.relu(self.bn(self.stem(x), use_running_average=not train))
        for i in range(len(RESNET_STAGES)):
            x = getattr(self, f"block_{i}")(x, train)
        return self.head(spatial_mean(x))


class NnxBlock(nnx.Module):
    """x + attn(ln(x)), then x + mlp(ln(x))."""

    def __init__(self, rngs: nnx.Rngs):
        self.ln_0 = nnx.LayerNorm(DIM, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, DIM, decode=False, rngs=rngs)
        self.ln_1 = nnx.LayerNorm(DIM, rngs=rngs)
        self.up = nnx.Linear(DIM, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, DIM, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.ln_0(x))
        return x + self.down(nnx.gelu(self.up(self.ln_1(x))))


class NnxTransformer(nnx.Module):
    """Patches as tokens, learned positions, the mean over the tokens at the end."""

    def __init__(self, shape: Shape, n_classes: int, rngs: nnx.Rngs):
        side = patch_side(shape)
        tokens = -(-shape[0] // side) * -(-shape[1] // side)
        self.patches = nnx.Conv(shape[-1], DIM, (side, side), (side, side), rngs=rngs)
        self.positions = nnx.Param(nn.initializers.normal(1.0)(rngs.params(), (tokens, DIM), jnp.float32))
        for i in range(DEPTH):
            setattr(self, f"block_{i}", NnxBlock(rngs))
        self.ln = nnx.LayerNorm(DIM, rngs=rngs)
        self.head = nnx.Linear(DIM, n_classes, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        x = self.patches(x).reshape(len(x), -1, DIM) + self.positions[...][None]
        for i in range(DEPTH):
            x = getattr(self, f"block_{i}")(x)
        return self.head(self.ln(x).mean(axis=1))


# --- both ------------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """One classifier in both frameworks."""

    linen: Callable[[int], nn.Module]
    nnx: Callable[[Shape, int, nnx.Rngs], nnx.Module]


MODELS = {
    "mlp": Model(LinenMLP, NnxMLP),
    "cnn": Model(LinenCNN, NnxCNN),
    "resnet": Model(LinenResNet, NnxResNet),
    "transformer": Model(LinenTransformer, NnxTransformer),
}


def init_linen(name: str, shape: Shape, n_classes: int, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return a Linen model and its variables, `{"params": ..., "batch_stats": ...}`."""
    model = MODELS[name].linen(n_classes)
    return model, model.init(jax.random.key(seed), jnp.zeros((1, *shape)))


def init_nnx(name: str, shape: Shape, n_classes: int, seed: int) -> nnx.Module:
    """Return an NNX module."""
    return MODELS[name].nnx(shape, n_classes, nnx.Rngs(seed))
