"""Random networks, drawn as lists of steps, and what each step is: in JAX, and in the integers of `integers`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import integers
import jaxq
from jaxq.numbers.affine import affine_of

STATIC = {"per_tensor": True, "calibrator": jaxq.minmax()}
POLICIES = (
    jaxq.w8a8(static=True),
    jaxq.w8a8(static=True, symmetric=False),
    jaxq.Scheme(jaxq.int8(), jaxq.int8(**STATIC), out=jaxq.int8(**STATIC)),
    jaxq.Scheme(jaxq.int4(), jaxq.uint8(**STATIC), out=jaxq.int8(symmetric=False, **STATIC)),
    jaxq.Scheme(jaxq.int8(power_of_two=True), jaxq.int8(power_of_two=True, **STATIC)),
    jaxq.Scheme(jaxq.fixed(8, 6), jaxq.fixed(8, 4)),
)


class Step(NamedTuple):
    """kind: which operation; name: of its parameters; more: what else it needs, steps of a branch among it."""

    kind: str
    name: str = ""
    more: Any = None


class Net(NamedTuple):
    steps: list[Step]
    params: dict[str, jax.Array]
    x: jax.Array

    def __call__(self, params, x):
        for step in self.steps:
            x = run(step, params, x)
        return x


# --- in JAX ----------------------------------------------------------------------------------------------------------


def _wide(c, x):
    return c.reshape((1,) * (x.ndim - 1) + (-1,))


def _conv(name, more, p, x):
    strides, padding, groups = more
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, p[name], strides, padding, None, None, numbers, feature_group_count=groups)


def _norm(name, more, p, x):
    return (x - _wide(p[f"{name}_mean"], x)) * _wide(p[f"{name}_gain"], x) + _wide(p[f"{name}_shift"], x)


def _pool(name, reduce, p, x):
    init, size = (-jnp.inf, 2) if reduce is lax.max else (0.0, 2)
    return lax.reduce_window(x, init, reduce, (1, size, size, 1), (1, size, size, 1), "VALID")


def _branch(steps, p, x):
    for step in steps:
        x = run(step, p, x)
    return x


def _upsampled(x):
    """Return images of twice the size, every pixel four times."""
    n, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


STEPS = {
    "conv": _conv,
    "dense": lambda name, more, p, x: x @ p[name],
    "bias": lambda name, more, p, x: x + _wide(p[name], x),
    "norm": _norm,
    "relu": lambda name, more, p, x: jax.nn.relu(x),
    "relu6": lambda name, more, p, x: jax.nn.relu6(x),
    "max_pool": lambda name, more, p, x: _pool(name, lax.max, p, x),
    "avg_pool": lambda name, more, p, x: _pool(name, lax.add, p, x) / 4.0,
    "mean": lambda name, more, p, x: jnp.mean(x, (1, 2)),
    "flatten": lambda name, more, p, x: x.reshape(x.shape[0], -1),
    "residual": lambda name, more, p, x: x + _branch(more, p, x),
    "projected": lambda name, more, p, x: _branch(more[0], p, x) + _branch(more[1], p, x),
    "concat": lambda name, more, p, x: jnp.concatenate([x, _branch(more, p, x)], -1),
    "upsample": lambda name, more, p, x: _upsampled(x),
}


def run(step, p, x):
    return STEPS[step.kind](step.name, step.more, p, x)


# --- in integers -----------------------------------------------------------------------------------------------------


def grid(quantizer, r):
    """Return a static grid; the rule of its scale is judged by other tests."""
    if isinstance(quantizer.format, jaxq.Fixed):
        scale, zero = 2.0**-quantizer.format.frac_bits, 0
    else:
        scale, zero = affine_of(quantizer, r)
    down = 128 if quantizer.format.storage == jnp.uint8 else 0
    low, high = quantizer.bounds()
    return integers.Grid(float(scale), int(zero or 0) - down, low - down, high - down)


class Judge:
    """Runs a net in int64. qparams: converted; only codes and scales of weights are read from it."""

    def __init__(self, net, plan, qparams):
        self.net, self.plan, self.qparams = net, plan, qparams

    def __call__(self, x):
        v = np.asarray(x)
        for step in self.net.steps:
            v = self.step(step, v)
        return integers.left(v)

    def site(self, name, x):
        decision, ranges = self.plan[name], list(self.plan.range(name))
        if decision.feed(0):
            ranges[0] = self.plan.range(decision.feed(0).site)[2]
        own = grid(decision.quantizers[0], ranges[0])
        x = integers.entered(x, own) if isinstance(x, np.ndarray) else x
        w = self.qparams[name].plain()
        return x, np.asarray(w.codes, np.int64), np.asarray(w.scale, np.float64), own

    def put_out(self, name, v):
        out = self.plan[name].out
        return v if out is None else integers.narrowed(v, grid(out, (*self.plan.range(name), None)[2]))

    def constant(self, name, v):
        return np.asarray(self.net.params[name], np.float64).reshape((1,) * (v.codes.ndim - 1) + (-1,))

    def step(self, step, v):
        name, more = step.name, step.more
        if step.kind == "conv":
            strides, padding, groups = more
            v = integers.conv(*self.site(name, v), strides=strides, padding=padding, groups=groups)
            return self.put_out(name, v)
        if step.kind == "dense":
            return self.put_out(name, integers.dense(*self.site(name, v)))
        if step.kind == "norm":
            mean, gain, shift = (self.constant(f"{name}_{part}", v) for part in ("mean", "gain", "shift"))
            return integers.plus(integers.times(integers.plus(v, -mean), gain), shift)
        if step.kind == "projected":
            return integers.add(*(self.branch(steps, v) for steps in more))
        if step.kind in ("residual", "concat"):
            return (integers.add if step.kind == "residual" else integers.concatenate)(v, self.branch(more, v))
        return {
            "bias": lambda: integers.plus(v, self.constant(name, v)),
            "relu": lambda: integers.clamped(v, np.maximum, 0.0),
            "relu6": lambda: integers.clamped(integers.clamped(v, np.maximum, 0.0), np.minimum, 6.0),
            "max_pool": lambda: integers.max_pool(v, 2),
            "avg_pool": lambda: integers.times(integers.sum_pool(v, 2), np.array(0.25)),
            "mean": lambda: integers.mean_over_space(v),
            "flatten": lambda: integers.flatten(v),
            "upsample": lambda: integers.upsampled(v),
        }[step.kind]()

    def branch(self, steps, v):
        for step in steps:
            v = self.step(step, v)
        return v


# --- drawn -----------------------------------------------------------------------------------------------------------


class Draw:
    """Draws a net step by step; shape: of the value so far, without the batch."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.params: dict[str, jax.Array] = {}
        self.shape = (int(self.rng.integers(6, 10)), int(self.rng.integers(6, 10)), int(self.rng.choice([1, 3, 4])))

    def some(self, name, *shape, scale=1.0, mean=0.0):
        self.params[name] = jnp.asarray(self.rng.normal(mean, scale, shape), jnp.float32)

    def conv(self, outputs, *, keep=False, groups=None, size=None, stride=None):
        h, w, c = self.shape
        size = size or int(self.rng.choice([1, 3]))
        groups = groups or (c if outputs == c and c > 1 and self.rng.random() < 0.3 else 1)
        stride = stride or (1 if keep or min(h, w) < 4 else int(self.rng.integers(1, 3)))
        side = size // 2 if keep or min(h, w) < size else int(self.rng.integers(0, size // 2 + 1))
        name = f"conv{len(self.params)}"
        self.some(name, size, size, c // groups, outputs, scale=(size * size * c / groups) ** -0.5)
        spread = [(n + 2 * side - size) // stride + 1 for n in (h, w)]
        self.shape = (*spread, outputs)
        return Step("conv", name, ((stride, stride), ((side, side), (side, side)), groups))

    def dense(self, outputs):
        name = f"dense{len(self.params)}"
        self.some(name, self.shape[0], outputs, scale=self.shape[0] ** -0.5)
        self.shape = (outputs,)
        return Step("dense", name)

    def channels(self):
        """A bias or a BatchNorm."""
        name, n = f"channel{len(self.params)}", self.shape[-1]
        if self.rng.random() < 0.5:
            self.some(name, n, scale=0.3)
            return Step("bias", name)
        return self.norm()

    def norm(self):
        """A BatchNorm in evaluation mode, gains of both signs among its channels."""
        name, n = f"channel{len(self.params)}", self.shape[-1]
        self.some(f"{name}_mean", n, scale=0.2)
        self.some(f"{name}_gain", n, scale=0.7, mean=0.7)
        self.some(f"{name}_shift", n, scale=0.3)
        return Step("norm", name)

    def after(self):
        kinds = [[], [Step("relu")], [Step("relu6")]]
        return [self.channels(), *kinds[int(self.rng.integers(3))]]

    def block(self):
        kind = self.rng.choice(["plain", "residual", "concat", "max_pool", "avg_pool"])
        if kind in ("residual", "concat"):
            channels = self.shape[2]
            steps = [self.conv(channels, keep=True), *self.after()]
            self.shape = (*self.shape[:2], channels * (2 if kind == "concat" else 1))
            return [Step(str(kind), "", steps)]
        steps = [self.conv(int(self.rng.choice([2, 4, 6]))), *self.after()]
        if kind != "plain" and min(self.shape[:2]) >= 2:
            self.shape = (self.shape[0] // 2, self.shape[1] // 2, self.shape[2])
            steps.append(Step(str(kind)))
        return steps


def drawn(seed):
    """Draw a net of a stem, up to three blocks and a head."""
    draw = Draw(seed)
    x = jnp.asarray(draw.rng.normal(size=(3, *draw.shape)), jnp.float32)
    steps = [draw.conv(4), *draw.after()]
    for _ in range(int(draw.rng.integers(1, 4))):
        steps += draw.block()
    whole = draw.rng.random() < 0.5
    draw.shape = (draw.shape[2],) if whole else (int(np.prod(draw.shape)),)
    steps += [Step("mean" if whole else "flatten"), draw.dense(8), *draw.after(), draw.dense(3)]
    return Net(steps, draw.params, x)
