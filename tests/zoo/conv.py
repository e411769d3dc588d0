"""Models of convolutions: batch normalisation, residuals, and every kind of window."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from .entry import Model, affine, dense, linen, nnx_module, normal, weight


def _avg_pool(x: jax.Array) -> jax.Array:
    """Average over windows of 2 by 2."""
    # nn.avg_pool divides by an integer array, which strict dtype promotion refuses.
    return nn.pool(x, 0.0, lax.add, (2, 2), (2, 2), "VALID") / 4.0


class _Cnn(nn.Module):
    """Two convolutions with batch normalisation and pooling, dropout, two dense layers."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn1")(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.Conv(16, (3, 3), name="conv2")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn2")(x))
        x = _avg_pool(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(0.25, deterministic=not train)(x)
        x = nn.relu(nn.Dense(32, name="mid")(x))
        return nn.Dense(10, name="head")(x)


class _CnnEval(nn.Module):
    """`_Cnn` with running averages and without dropout."""

    @nn.compact
    def __call__(self, x):
        return _Cnn(name="cnn")(x, train=False)


def linen_cnn_eval() -> Model:
    """The CNN in evaluation mode."""
    return linen("linen_cnn_eval", _CnnEval(), normal(0, 8, 12, 12, 3), sites=4)


def linen_cnn_train() -> Model:
    """The CNN in training mode: `(out, updated batch statistics)`, the dropout key an argument."""
    module, evaluated = _Cnn(), linen_cnn_eval()

    def fn(variables, x, key):
        return module.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    variables = {collection: tree["cnn"] for collection, tree in evaluated.params.items()}
    return Model("linen_cnn_train", fn, variables, (*evaluated.args, jax.random.key(1)), sites=4)


class _ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, projected where the shape changes."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        strides = (self.stride, self.stride)
        y = nn.Conv(self.features, (3, 3), strides, use_bias=False, name="conv1")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True, name="bn1")(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False, name="conv2")(y)
        y = nn.BatchNorm(use_running_average=True, name="bn2")(y)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), strides, use_bias=False, name="proj")(x)
            x = nn.BatchNorm(use_running_average=True, name="bn_proj")(x)
        return nn.relu(x + y)


class _Resnet(nn.Module):
    """A stem, a block with an identity shortcut, one with a projection, a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = _ResidualBlock(8, 1, name="block0")(x)
        x = _ResidualBlock(16, 2, name="block1")(x)
        return nn.Dense(10, name="head")(jnp.mean(x, axis=(1, 2)))


def linen_resnet() -> Model:
    """Stem 1, identity block 2, projected block 3, head 1."""
    return linen("linen_resnet", _Resnet(), normal(0, 8, 8, 8, 3), sites=7)


class _NnxCnn(nnx.Module):
    """Two convolutions with batch normalisation in evaluation mode, and a head."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.bn2 = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        return self.head(jnp.mean(x, axis=(1, 2)))


def nnx_cnn() -> Model:
    """The NNX CNN, the module a pytree argument."""
    return nnx_module("nnx_cnn", _NnxCnn, normal(1, 8, 8, 8, 3), sites=3)


class _Pooled(nn.Module):
    """Convolutions in order, the mean over space, a head."""

    convs: tuple[nn.Module, ...]

    @nn.compact
    def __call__(self, x):
        for conv in self.convs:
            x = nn.relu(conv(x))
        return nn.Dense(10, name="head")(jnp.mean(x, axis=tuple(range(1, x.ndim - 1))))


def depthwise_separable() -> Model:
    """A depthwise convolution (one input channel per group) and a pointwise one."""
    depthwise = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")
    module = _Pooled((depthwise, nn.Conv(16, (1, 1), name="pointwise")))
    return linen("depthwise_separable", module, normal(0, 8, 8, 8, 8), sites=3)


def grouped_conv() -> Model:
    """A convolution in four groups."""
    module = _Pooled((nn.Conv(16, (3, 3), feature_group_count=4, name="grouped"),))
    return linen("grouped_conv", module, normal(0, 8, 8, 8, 8), sites=2)


class _Upsample(nn.Module):
    """A strided transposed convolution, then a pointwise one."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.ConvTranspose(8, (3, 3), strides=(2, 2), name="up")(x))
        return nn.Conv(3, (1, 1), name="head")(x)


def transposed_conv() -> Model:
    """ConvTranspose with stride two: dilation of the left operand."""
    return linen("transposed_conv", _Upsample(), normal(0, 8, 4, 4, 8), sites=2)


def dilated_conv() -> Model:
    """A convolution whose kernel is dilated by two, without padding."""
    module = _Pooled((nn.Conv(16, (3, 3), kernel_dilation=(2, 2), padding="VALID", name="dilated"),))
    return linen("dilated_conv", module, normal(0, 8, 8, 8, 8), sites=2)


def conv1d() -> Model:
    """A strided convolution over one axis, causally padded."""
    module = _Pooled((nn.Conv(16, (3,), strides=(2,), padding="CAUSAL", name="conv"),))
    return linen("conv1d", module, normal(0, 8, 12, 8), sites=2)


def conv3d() -> Model:
    """A convolution over three axes."""
    module = _Pooled((nn.Conv(8, (2, 3, 3), name="conv"),))
    return linen("conv3d", module, normal(0, 8, 4, 6, 6, 4), sites=2)


def nchw_conv() -> Model:
    """Two convolutions of [n, c, h, w] by [o, i, h, w], and a head."""

    def conv(layer, x, strides):
        y = lax.conv_general_dilated(x, layer["kernel"], strides, "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        return jax.nn.relu(y + layer["bias"][None, :, None, None])

    def fn(params, x):
        h = conv(params["conv2"], conv(params["conv1"], x, (1, 1)), (2, 2))
        return affine(params["head"], jnp.mean(h, axis=(2, 3)))

    def layer(seed, features_in, features_out):
        kernel = weight(seed, features_out, features_in, 3, 3, fan_in=9 * features_in)
        return {"kernel": kernel, "bias": normal(seed + 1, features_out, scale=0.1)}

    params = {"conv1": layer(0, 3, 8), "conv2": layer(10, 8, 16), "head": dense(20, 16, 10)}
    return Model("nchw_conv", fn, params, (normal(30, 8, 3, 8, 8),), sites=3)


BUILDERS = (
    linen_cnn_eval,
    linen_cnn_train,
    linen_resnet,
    nnx_cnn,
    depthwise_separable,
    grouped_conv,
    transposed_conv,
    dilated_conv,
    conv1d,
    conv3d,
    nchw_conv,
)
