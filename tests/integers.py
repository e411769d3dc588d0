"""Programs in integers, an operation at a time in NumPy int64: the judge of `jaxq.integer`. Nothing of jaxq or JAX.

A value is `scale * codes`, zero points taken off, with what its codes can be. The rules are those that `jaxq/integer`
states: sums keep their scale, constants are rounded to it, values of different scales meet at a power of two that
leaves their sum thirty bits, and a site rounds what it takes to its own grid.
"""

import math
from typing import NamedTuple

import numpy as np

import oracle

INT32 = -(2**31), 2**31 - 1


class Grid(NamedTuple):
    """int8 codes: scale, zero point, the lowest and the highest code."""

    scale: float
    zero: int
    low: int
    high: int


class Held(NamedTuple):
    """codes: int64; scale, low, high: of the codes' rank; narrow: whether the codes are int8."""

    codes: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    narrow: bool = False

    @property
    def reach(self):
        return np.maximum(np.maximum(-self.low, self.high), 1)

    @property
    def real_reach(self):
        return float((self.reach * self.scale).max())


def held(codes, scale, low, high, narrow=False):
    """Make a value; its codes are within their bounds, and those within int32."""
    value = Held(codes, scale, np.asarray(low), np.asarray(high), narrow)
    assert (value.low <= codes).all() and (codes <= value.high).all()
    assert value.low.min() >= INT32[0] and value.high.max() <= INT32[1]
    return value


def multiply(code, ratio):
    """Return round(code * ratio) of Python integers: halves up, by a mantissa of 31 bits; halves away by a shift."""
    fraction, exponent = math.frexp(ratio)
    mantissa = math.floor(fraction * 2**31 + 0.5)
    return (code * mantissa + (1 << (30 - exponent))) >> (31 - exponent)


def shift(code, exponent):
    """Return round(code * 2^exponent), halves away from zero."""
    if exponent >= 0:
        return code << exponent
    half = 1 << (-exponent - 1)
    return (abs(code) + half >> -exponent) * (1 if code >= 0 else -1)


def rescaled(v, scale):
    """Bring a value to another scale, saturated."""
    ratio = np.broadcast_to(v.scale / scale, np.broadcast_shapes(v.scale.shape, scale.shape))
    if (ratio == 1).all():
        return v._replace(scale=scale, narrow=False)
    powers = all(math.frexp(r)[0] == 0.5 for r in ratio.ravel())
    each = (lambda c, r: shift(int(c), math.frexp(r)[1] - 1)) if powers else (lambda c, r: multiply(int(c), r))
    codes = np.vectorize(each, otypes=[object])(v.codes, np.broadcast_to(ratio, v.codes.shape))
    low, high = np.floor(v.low * ratio) - 1, np.ceil(v.high * ratio) + 1
    clip = [np.clip(end, *INT32).astype(np.int64) for end in (codes, low, high)]
    return held(clip[0], scale, clip[1], clip[2])


def same(x, rank):
    return np.full((1,) * rank, x)


def narrowed(v, grid):
    """Round to a grid of int8 codes."""
    codes = rescaled(v, same(grid.scale, v.codes.ndim)).codes
    ends = [same(end - grid.zero, v.codes.ndim) for end in (grid.low, grid.high)]
    return held(np.clip(codes, ends[0], ends[1]), same(grid.scale, v.codes.ndim), *ends, narrow=True)


def entered(x, grid):
    """Quantize in float32, the way every program of jaxq does."""
    inverse = np.float32(1) / (np.float32(grid.scale) * np.float32(0.25))
    steps = np.rint(np.float32(x) * np.float32(0.25) * inverse).astype(np.int64)
    ends = [same(end - grid.zero, x.ndim) for end in (grid.low, grid.high)]
    return held(np.clip(steps, ends[0], ends[1]), same(grid.scale, x.ndim), *ends, narrow=True)


def power_above(x):
    return 2.0 ** math.ceil(math.log2(x))


def together(values, extra=0.0):
    total = sum(v.real_reach for v in values) + extra
    scales = {float(v.scale.max()) for v in values}
    if len(scales) == 1 and all(v.scale.size == 1 for v in values) and total / min(scales) <= 2**30:
        return [v._replace(narrow=False) for v in values]
    return [rescaled(v, same(power_above(total / 2**30), v.codes.ndim)) for v in values]


def uniform(v):
    if (v.scale == v.scale.max()).all():
        return v._replace(scale=same(v.scale.max(), v.codes.ndim))
    return rescaled(v, same(power_above(v.real_reach / 2**30), v.codes.ndim))


def summable(v, terms):
    """Shift down what int32 might not hold the sum of."""
    return within(v, INT32[1] // terms)


def refined(v):
    return Held(v.codes << 16, v.scale / 2**16, v.low << 16, v.high << 16) if v.narrow else v


# --- operations ------------------------------------------------------------------------------------------------------


def dense(x, w, scale, grid):
    """x @ w. w: codes [k, n]; scale: [1, n]."""
    v = narrowed(x, grid)
    ends = [np.minimum.reduce, np.maximum.reduce]
    low, high = (pick([w * v.low.min(), w * v.high.max(), 0 * w]).sum(0, keepdims=True) for pick in ends)
    return held(oracle.dot_general(v.codes, w, ((1,), (0,)), ((), ())), v.scale * scale, low, high)


def conv(x, w, scale, grid, *, strides, padding, groups):
    """Convolution of images [n, h, w, c] by [h, w, i, o]; scale: [1, 1, 1, o]."""
    v = narrowed(x, grid)
    specs = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    codes = oracle.conv_general_dilated(v.codes, w, strides, padding, (1, 1), (1, 1), specs, groups)
    ends = [np.minimum.reduce, np.maximum.reduce]
    low, high = (pick([w * v.low.min(), w * v.high.max(), 0 * w]).sum((0, 1, 2)).reshape(1, 1, 1, -1) for pick in ends)
    return held(codes, v.scale * scale, low, high)


def plus(v, c):
    """v + c, the constant rounded to the scale of v, in steps finer by as many of 16 bits as thirty have room for."""
    total = float((v.reach + np.abs(c / v.scale)).max())
    if total > INT32[1]:
        v = rescaled(v, same(power_above(float((v.reach * v.scale + np.abs(c)).max()) / 2**30), v.codes.ndim))
    else:
        bits = 0
        while bits < 16 and total * 2 ** (bits + 1) <= 2**30:
            bits += 1
        v = Held(v.codes << bits, v.scale / 2**bits, v.low << bits, v.high << bits)
    steps = np.rint(c / v.scale).astype(np.int64)
    return held(v.codes + steps, v.scale, v.low + steps, v.high + steps)


def times(v, c):
    """v * c: the scale times |c|, the codes times its sign."""
    sign, size = np.sign(c).astype(np.int64), np.where(c == 0, 1, np.abs(c))
    low, high = np.minimum(v.low * sign, v.high * sign), np.maximum(v.low * sign, v.high * sign)
    return held(v.codes * sign, v.scale * size, low, high, v.narrow and bool((c > 0).all()))


def add(a, b):
    a, b = together([a, b])
    return held(a.codes + b.codes, a.scale, a.low + b.low, a.high + b.high)


def concatenate(a, b):
    a, b = together([a, b])
    codes = np.concatenate([a.codes, b.codes], -1)
    rank = codes.ndim
    return held(codes, a.scale, same(min(a.low.min(), b.low.min()), rank), same(max(a.high.max(), b.high.max()), rank))


def clamped(v, pick, c):
    if v.narrow and c:
        v = refined(v)
    ends = (v.low.min(), v.high.max()) if v.narrow else INT32
    steps = np.clip(np.rint(c / v.scale), *ends).astype(np.int64)
    return held(pick(v.codes, steps), v.scale, pick(v.low, steps), pick(v.high, steps), v.narrow)


def windows(v, size):
    n, h, w, c = v.codes.shape
    cut = v.codes[:, : h // size * size, : w // size * size]
    return cut.reshape(n, h // size, size, w // size, size, c)


def max_pool(v, size):
    return v._replace(codes=windows(v, size).max((2, 4)))


def sum_pool(v, size):
    terms = size * size
    v = summable(v, terms)
    low, high = np.minimum(v.low, 0) * terms, np.maximum(v.high, 0) * terms
    return held(windows(v, size).sum((2, 4)), v.scale, low, high)


def mean_over_space(v):
    terms = v.codes.shape[1] * v.codes.shape[2]
    v = summable(v, terms)
    ends = [end.reshape(1, -1) * terms for end in (v.low, v.high)]
    return held(v.codes.sum((1, 2)), v.scale.reshape(1, -1) / terms, *ends)


def flatten(v):
    v = uniform(v)
    ends = [same(end, 2) for end in (v.low.min(), v.high.max())]
    return Held(v.codes.reshape(v.codes.shape[0], -1), same(v.scale.max(), 2), *ends, v.narrow)


def upsampled(v):
    """Every pixel four times, at one scale."""
    v = uniform(v)
    ends = [same(end, 4) for end in (v.low.min(), v.high.max())]
    return Held(v.codes.repeat(2, 1).repeat(2, 2), v.scale, *ends, v.narrow)


def table(v, grid, f, wanted):
    """Look up f of an int8 value, of grid `grid`, in the codes of the grid `wanted`."""
    codes = np.arange(-128, 128)
    reals = f(np.float32(grid.scale * (codes - grid.zero))).astype(np.float64)
    made = np.clip(np.rint(reals / wanted.scale), wanted.low - wanted.zero, wanted.high - wanted.zero).astype(np.int64)
    used = made[grid.low + 128 : grid.high + 129]
    ends = [same(end, v.codes.ndim) for end in (used.min(), used.max())]
    return held(made[v.codes + grid.zero + 128], same(wanted.scale, v.codes.ndim), *ends, narrow=True)


def dot(x, y, left_grid, right_grid, contracted):
    """Products of two values, each on its grid, zero points zero; contracted: an axis of each."""
    a, b = narrowed(x, left_grid), narrowed(y, right_grid)
    codes = oracle.dot_general(a.codes, b.codes, tuple((axis,) for axis in contracted), ((), ()))
    end = a.codes.shape[contracted[0]] * int(a.low.min()) * int(b.low.min())
    top = a.codes.shape[contracted[0]] * int(a.low.min()) * int(b.high.max())
    end = max(end, a.codes.shape[contracted[0]] * int(a.high.max()) * int(b.high.max()))
    return held(codes, same(float(a.scale.max() * b.scale.max()), 2), same(top, 2), same(end, 2))


def product(a, b):
    """Products of two values, shifted down to thirty bits, halves up."""
    reach = float(a.reach.max()) * float(b.reach.max())
    down = max(0, math.ceil(math.log2(reach / 2**30)))
    codes = (a.codes * b.codes + (1 << down >> 1)) >> down
    end = same(math.ceil(reach / 2**down), codes.ndim)
    return held(codes, a.scale * b.scale * 2.0**down, -end, end)


def table_alone(v, grid, f):
    """Look up a growing function of an int8 value, of grid `grid`, in 2^15 steps of what it may be, zero included."""
    low, high = (float(f(np.float32(end.item() * v.scale.item()))) for end in (v.low, v.high))
    scale = (max(high, 0.0) - min(low, 0.0)) / 2**15
    made = np.rint(f(np.float32(grid.scale * (np.arange(-128, 128) - grid.zero))).astype(np.float64) / scale)
    made, rank = made.astype(np.int64), v.codes.ndim
    used = made[grid.low + 128 : grid.high + 129]
    return held(made[v.codes + grid.zero + 128], same(scale, rank), same(used.min(), rank), same(used.max(), rank))


# --- loops -----------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """How a value is carried: codes of a scale that is a power of two, of at most this size."""

    scale: float
    reach: int

    def of(self, v):
        codes = rescaled(v, same(self.scale, v.codes.ndim)).codes
        ends = same(self.reach, v.codes.ndim)
        return held(np.clip(codes, -ends, ends), same(self.scale, v.codes.ndim), -ends, ends)


def states(step, shape, bounds, length):
    """Return how a loop's values are carried. step: an iteration, of a list of values; bounds: of the first ones."""

    def within(bounds):
        scales = [power_above(1.001 * b / 2**30) if b else 2.0**-30 for b in bounds]
        return [State(scale, math.ceil(1.001 * b / scale)) for scale, b in zip(scales, bounds, strict=True)]

    def grown(bounds):
        zeros = held(np.zeros(shape, np.int64), same(1.0, len(shape)), same(0, len(shape)), same(0, len(shape)))
        carried = within(bounds)
        outs = step([state.of(zeros) for state in carried])
        later = [max(b, out.real_reach) for b, out in zip(bounds, outs, strict=True)]
        before = [state.scale * state.reach for state in carried]
        return later, [b - a if b > (1 + 1e-8) * a else 0.0 for a, b in zip(before, later, strict=True)]

    steps = [0.0] * len(bounds)
    for _ in range(2 + len(bounds)):
        before, (bounds, steps) = steps, grown(bounds)
        if not any(steps):
            return within(bounds)
    shares = [step / old if old > step else 0.0 for old, step in zip(before, steps, strict=True)]
    rests = [1.001 * step * r / (1 - r) for step, r in zip(steps, shares, strict=True)]
    settled = [b + rest for b, rest in zip(bounds, rests, strict=True)]
    short = all(rest <= 17 / 16 * length * step for rest, step in zip(rests, steps, strict=True))
    if short and not any(grown(settled)[1]):
        return within(settled)
    return within([b + 17 / 16 * length * step for b, step in zip(bounds, steps, strict=True)])


# --- rows ------------------------------------------------------------------------------------------------------------


def int32(x):
    assert -(2**31) <= x < 2**31, "int32 would have wrapped"
    return x


def within(v, reach):
    if v.reach.max() <= reach:
        return v._replace(narrow=False)
    return rescaled(v, same(power_above(v.real_reach / (reach - 1)), v.codes.ndim))


def power_of_two(x, bits):
    """2^(x / 2^15) in steps of 2^-bits, for x of at most zero: a polynomial of the fraction, shifted."""
    coefficients = [round(c * 2**15) for c in (0.99990029, 0.69632477, 0.22469316, 0.07896726)]
    whole, part = divmod(int(x), 2**15)
    value = coefficients[3]
    for c in coefficients[2::-1]:
        value = int32((value * part + 2**14) // 2**15) + c
    return int32(value * 2 ** max(bits - 15, 0)) // 2 ** min(max(15 - bits, 0) - whole, 60)


def logarithm(x):
    """2^15 log2(x) of integers of at least 1: a polynomial of what is below the first bit."""
    coefficients = (1.44268147, -0.72035877, 0.46865888, -0.30163801, 0.14447110, -0.03382205)
    whole, steps = int(x).bit_length() - 1, [round(c * 2**15) for c in coefficients]
    part = ((int(x) << 31 - whole) >> 16) % 2**15
    value = steps[5]
    for c in steps[4::-1]:
        value = int32(value * part + 2**14) // 2**15 + c
    return (whole << 15) + int32(value * part + 2**14) // 2**15


def log_sum_exp(v):
    """The logarithm of the sum of powers along the last axis, less the largest number: integers of Python."""
    v = within(uniform(v), 2**30 - 1)
    below, count = v.codes - v.codes.max(-1, keepdims=True), v.codes.shape[-1]
    reach, spare = same(2 * int(v.reach.max()), below.ndim), math.ceil(math.log2(count))
    steps = rescaled(held(below, v.scale * math.log2(math.e), -reach, 0 * reach), same(2.0**-15, below.ndim)).codes
    totals = [sum(power_of_two(x, 29) for x in row) >> spare for row in steps]
    return [[max(logarithm(total) - ((29 - spare) << 15), 0)] for total in totals]


def softmax(v, slope):
    """Softmax along the last axis: integers of Python."""
    v = within(uniform(times(v, np.array(slope))), 2**30 - 1)
    below = v.codes - v.codes.max(-1, keepdims=True)
    reach = same(2 * int(v.reach.max()), below.ndim)
    steps = rescaled(held(below, v.scale * math.log2(math.e), -reach, 0 * reach), same(2.0**-15, below.ndim)).codes
    codes = np.zeros_like(below)
    for at in np.ndindex(below.shape[:-1]):
        powers = [power_of_two(x, 29) for x in steps[at]]
        spare = math.ceil(math.log2(below.shape[-1]))
        total = sum(powers) >> spare
        up = 31 - int(total).bit_length()
        inverse = (2**31 - 1) // (int32(total << up) >> 15)
        codes[at] = [int32(rounded_down_by(p, 16 + spare - up) * inverse) for p in powers]
    return held(codes, same(2.0**-30, codes.ndim), same(0, codes.ndim), same(2**30 + 2**16, codes.ndim))


def rounded_down_by(x, n):
    """x / 2^n, halves up."""
    return (x >> n) + (x >> (n - 1) & 1 if n else 0)


def norm(v, epsilon, centered=True):
    """Rows along the last axis over their root mean square, or standard deviation: integers of Python."""
    v = within(refined(uniform(v)), 2**30 - 1)
    count, unit = v.codes.shape[-1], float(v.scale.max())
    down = max(0, math.ceil(math.log2(count)) - 2)
    most = (5 + down) // 2
    added = epsilon / unit**2
    least = max(0, math.ceil(math.log2(added) / 2)) if added else 0
    codes = np.zeros_like(v.codes)
    for at in np.ndindex(v.codes.shape[:-1]):
        row = [int(c) for c in v.codes[at]]
        if centered:
            middle = (sum(row) + count // 2) // count
            row = [int32(c - middle) for c in row]
        length = max(max(map(abs, row)).bit_length(), least)
        short = [rounded_down_by(c, length - 14) if length > 14 else c << (14 - length) for c in row]
        squares = (sum(c * c for c in short) + (1 << down >> 1)) >> down
        squares = int32(squares + min(round(added * 4.0 ** (14 - length) * count / 2**down), 2**30 - 1))
        up = (32 - max(squares, 1).bit_length()) // 2 * 2
        inverse = (2**31 - 1) // max(math.isqrt(squares << up), 1)
        codes[at] = [rounded_down_by(int32(c * inverse), max(most - up // 2, 0)) for c in short]
    scale = 2.0 ** (most - 31) * math.sqrt(count / 2**down)
    end = min(2**30, math.ceil(math.sqrt(count) * (1 + 2**-12) / scale))
    return held(codes, same(scale, codes.ndim), same(-end, codes.ndim), same(end, codes.ndim))


def left(v):
    """Dequantize, float32."""
    return v.codes.astype(np.float32) * v.scale.astype(np.float32)
