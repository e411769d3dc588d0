"""What quantized arithmetic amounts to, in plain NumPy: the judge of the tests. Nothing of jaxq, nothing of JAX.

Integers are int64 and reals float64, and everything is written the obvious way, one loop per idea. Codes are always
given with their zero point taken off (`codes - zero_point`), so that padding is a plain zero.
"""

import math

import numpy as np

# --- numbers -------------------------------------------------------------------------------------------------------


def bounds(bits, *, signed=True, symmetric=True):
    """Return the smallest and the largest code; signed symmetric codes leave out the most negative one."""
    if not signed:
        return 0, 2**bits - 1
    return (-(2 ** (bits - 1)) + 1 if symmetric else -(2 ** (bits - 1))), 2 ** (bits - 1) - 1


def block(index, shape, grid):
    """Return the slices of an array of `shape` that belong to one element of its `grid`."""
    return tuple(slice(i * (n // g), (i + 1) * (n // g)) for i, n, g in zip(index, shape, grid, strict=True))


def collapse(x, grid, reduce):
    """Return `reduce` (`np.minimum` or `np.maximum`) of every block of `x` and zero: float64 of shape `grid`."""
    out = np.zeros(grid, np.float64)
    for index in np.ndindex(*grid):
        out[index] = reduce.reduce(x[block(index, x.shape, grid)].astype(np.float64), axis=None, initial=0.0)
    return out


def spread(small, shape):
    """Return an array of `shape` in which every block holds its own element of `small`."""
    out = np.zeros(shape, small.dtype)
    for index in np.ndindex(*small.shape):
        out[block(index, shape, small.shape)] = small[index]
    return out


def affine(lo, hi, bits, *, signed=True, symmetric=True):
    """Return the float64 scale of ranges `lo <= 0 <= hi`, and the *unrounded* zero point (zeros if symmetric)."""
    low, high = bounds(bits, signed=signed, symmetric=symmetric)
    if symmetric:
        width, zero = np.maximum(-lo if low else 0.0, hi) / high, np.zeros_like(hi)
        return np.where(width == 0, 1.0, width), zero
    scale = (hi - lo) / (high - low)
    scale = np.where(scale == 0, 1.0, scale)
    return scale, np.clip(low - lo / scale, low, high)


def encode(x, scale, zero, low, high):
    """Return `clip(round(x / scale) + zero)` as int64; scale and zero broadcast against x."""
    return np.clip(np.round(x.astype(np.float64) / scale) + zero, low, high).astype(np.int64)


def is_near_tie(reals, slack=1e-4):
    """Tell where a real number is so close to the middle of two integers that float32 may round it to either."""
    return np.abs(np.abs(reals - np.floor(reals)) - 0.5) < slack


# --- operations: int64 or float64, whatever the operands are ---------------------------------------------------------


def dot_general(a, b, contract, batch):
    """Return out[*batch, *a free, *b free]: sums over the pairs of axes in `contract`."""
    fresh = iter(range(a.ndim + b.ndim))
    left, right = [next(fresh) for _ in range(a.ndim)], [next(fresh) for _ in range(b.ndim)]
    for mine, other in (*zip(*contract, strict=True), *zip(*batch, strict=True)):
        right[other] = left[mine]
    used_a, used_b = {*contract[0], *batch[0]}, {*contract[1], *batch[1]}
    out = [left[axis] for axis in batch[0]]
    out += [left[axis] for axis in range(a.ndim) if axis not in used_a]
    out += [right[axis] for axis in range(b.ndim) if axis not in used_b]
    return np.einsum(a, left, b, right, out)


def conv_general_dilated(lhs, rhs, strides, padding, lhs_dilation, rhs_dilation, specs, groups=1):
    """Return the convolution; specs are (batch, feature, *space), (out, in, *space), (batch, feature, *space)."""
    x, w = lhs.transpose(specs[0]), rhs.transpose(specs[1])
    for axis, (dilation, pad) in enumerate(zip(lhs_dilation, padding, strict=True), 2):
        x = _pad(_dilate(x, axis, dilation), axis, pad)
    reach = [(k - 1) * d + 1 if k else 0 for k, d in zip(w.shape[2:], rhs_dilation, strict=True)]
    space = [max(0, (n - r) // s + 1) if n >= r else 0 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
    out = np.zeros((x.shape[0], w.shape[0], *space), np.result_type(x, w))
    inputs, outputs = w.shape[1], w.shape[0] // groups
    for tap in np.ndindex(*w.shape[2:]) if math.prod(space) else ():
        starts = [t * d for t, d in zip(tap, rhs_dilation, strict=True)]
        ends = [t + (n - 1) * s + 1 for t, n, s in zip(starts, space, strides, strict=True)]
        seen = x[(..., *(slice(*triple) for triple in zip(starts, ends, strides, strict=True)))]
        for group in range(groups):
            own, made = slice(group * inputs, (group + 1) * inputs), slice(group * outputs, (group + 1) * outputs)
            out[:, made] += np.einsum("nc...,oc->no...", seen[:, own], w[(made, slice(None), *tap)])
    return out.transpose(np.argsort(specs[2]))


def _dilate(x, axis, step):
    """Return `x` with `step - 1` zeros between its elements along `axis`."""
    size = (x.shape[axis] - 1) * step + 1 if x.shape[axis] else 0
    out = np.zeros((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
    out[(slice(None),) * axis + (slice(None, None, step),)] = x
    return out


def _pad(x, axis, pad):
    """Return `x` with zeros around `axis`; a negative amount takes elements away."""
    x = np.pad(x, [(max(0, pad[0]), max(0, pad[1])) if a == axis else (0, 0) for a in range(x.ndim)])
    keep = slice(max(0, -pad[0]), x.shape[axis] - max(0, -pad[1]))
    return x[(slice(None),) * axis + (keep,)]


def ragged_dot(lhs, rhs, sizes):
    """Return out[m, n]: run g of the rows times rhs[g]; rows after the last run are zero."""
    out = np.zeros((lhs.shape[0], rhs.shape[2]), np.result_type(lhs, rhs))
    start = 0
    for expert, size in enumerate(sizes):
        out[start : start + size] = np.einsum("mk,kn->mn", lhs[start : start + size], rhs[expert])
        start += size
    return out


def take(table, indices, mode, fill=np.nan, axis=0):
    """Return the slices of a table along `axis`. mode: `clip`, `fill`, `wrap`, or `within`: none is out of bounds."""
    n = table.shape[axis]
    if mode == "wrap":
        indices = indices % n
    out = np.take(table.astype(np.float64), np.clip(indices, 0, n - 1), axis)
    if mode == "fill":
        outside = (indices < 0) | (indices >= n)
        out[(slice(None),) * axis + (outside,)] = fill
    assert mode != "within" or ((indices >= 0) & (indices < n)).all()
    return out


# --- derivatives ---------------------------------------------------------------------------------------------------


def pullback(f, x, cotangent):
    """Return the gradient of `sum(cotangent * f(x))` by `x`, for a linear `f`: one element at a time."""
    out = np.zeros(x.shape, np.float64)
    for index in np.ndindex(*x.shape):
        basis = np.zeros(x.shape, np.float64)
        basis[index] = 1.0
        out[index] = np.sum(cotangent * f(basis))
    return out


def hessian(f, x, step=1e-3):
    """Return the matrix of second derivatives of a scalar function of a vector, by central differences."""
    out = np.zeros((x.size, x.size), np.float64)
    steps = np.eye(x.size) * step
    for i in range(x.size):
        for j in range(i + 1):
            corners = [f(x + a * steps[i] + b * steps[j]) * a * b for a in (1, -1) for b in (1, -1)]
            out[i, j] = out[j, i] = sum(corners) / (4 * step * step)
    return out
