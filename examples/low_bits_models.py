"""The classifiers that `low_bits.py` trains: Linen modules of an activation function, BatchNorm before it."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


def sign_like(x: jax.Array) -> jax.Array:
    """Return hard tanh: a sign's gradient, passed straight through between -1 and 1."""
    return jnp.clip(x, -1, 1)


def normed(x: jax.Array, train: bool) -> jax.Array:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


class ConvNet(nn.Module):
    """Three convolutions and two dense layers, BatchNorm after each; 94 k parameters on 28 x 28 pixels."""

    activate: Callable

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        padding = "VALID" if x.shape[1] > 8 else "SAME"
        for i, width in enumerate((32, 64, 64)):
            x = nn.Conv(width, (3, 3), padding=padding, use_bias=False, name=f"conv_{i}")(x)
            x = nn.avg_pool(x, (2, 2), (2, 2)) if i < 2 else x
            x = self.activate(normed(x, train))
        x = nn.Dense(64, use_bias=False, name="dense")(x.reshape(len(x), -1))
        return normed(nn.Dense(10, use_bias=False, name="head")(self.activate(normed(x, train))), train)


class Perceptron(nn.Module):
    """Dense layers, BatchNorm after each if asked for."""

    activate: Callable
    widths: tuple[int, ...]
    normalized: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(len(x), -1)
        for i, width in enumerate((*self.widths, 10)):
            x = nn.Dense(width, use_bias=not self.normalized, name="head" if i == len(self.widths) else f"dense_{i}")(x)
            x = normed(x, train) if self.normalized else x
            x = self.activate(x) if i < len(self.widths) else x
        return x


class ResNet20(nn.Module):
    """The residual network of CIFAR-10 (He et al. 2016, section 4.2), strided convolutions in its shortcuts."""

    activate: Callable
    width: int = 16  # of the first stage

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def conv(x: jax.Array, width: int, size: int, stride: int, name: str) -> jax.Array:
            return normed(nn.Conv(width, (size, size), (stride, stride), use_bias=False, name=name)(x), train)

        x = self.activate(conv(x, self.width, 3, 1, "stem"))
        for stage in range(3):
            for block in range(3):
                name, width = f"stage_{stage}_{block}", self.width * 2**stage
                stride = 2 if stage and not block else 1
                y = self.activate(conv(x, width, 3, stride, f"{name}_a"))
                y = conv(y, width, 3, 1, f"{name}_b")
                x = self.activate(y + (conv(x, width, 1, stride, f"{name}_shortcut") if stride == 2 else x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class MobileNetV2(nn.Module):
    """Inverted residuals with depthwise convolutions and ReLU6 (Sandler et al. 2018), few of them, for small images."""

    activate: Callable

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def conv(x: jax.Array, width: int, size: int, stride: int, name: str, groups: int = 1) -> jax.Array:
            shape, strides = (size, size), (stride, stride)
            made = nn.Conv(width, shape, strides, feature_group_count=groups, use_bias=False, name=name)
            return normed(made(x), train)

        def clipped(x: jax.Array) -> jax.Array:
            return jnp.minimum(self.activate(x), 6)

        x = clipped(conv(x, 16, 3, 2, "stem"))
        for block, (width, stride) in enumerate(((16, 1), (24, 2), (24, 1), (32, 2), (32, 1))):
            name, wide = f"block_{block}", 4 * x.shape[-1]
            y = clipped(conv(x, wide, 1, 1, f"{name}_up"))
            y = clipped(conv(y, wide, 3, stride, f"{name}_depthwise", wide))
            y = conv(y, width, 1, 1, f"{name}_down")
            x = x + y if x.shape == y.shape else y
        x = clipped(conv(x, 128, 1, 1, "last"))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class Rows(nn.Module):
    """An LSTM that reads an image row by row, a time series, and a dense layer on its last state."""

    activate: Callable  # of none: an LSTM has its own

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        states = nn.RNN(nn.OptimizedLSTMCell(64), name="lstm")(x.reshape(*x.shape[:2], -1))
        return nn.Dense(10, name="head")(states[:, -1])
