"""Codes of 4, 2 and 1 bits as bytes: two, four or eight of them in each.

The layout is planar: along the packed axis of length n, byte j holds codes j, j + m, j + 2m, ... from its lowest bits
up, where m = ceil(n / codes per byte). So unpacking is a shift for each plane and one concatenation, not interleaved,
which every backend does at the speed of memory. Codes that do not fill the last bytes are padded with zero bits.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers.formats import Binary, Format

PACKED_BITS = (1, 2, 4)


def pack(codes: jax.Array, form: Format, axis: int) -> jax.Array:
    """Return bytes that hold codes of 1, 2 or 4 bits, packed along `axis`.

    codes: [..., n, ...] in the format's storage; result: uint8 [..., ceil(n * bits / 8), ...]. Raises `ValueError` for
    a width that does not divide a byte.

    >>> from jaxq.numbers.formats import Int
    >>> pack(jnp.array([1, -1, 3], jnp.int8), Int(4), 0).tolist()
    [49, 15]
    """
    per_byte = _per_byte(form.bits)
    axis %= codes.ndim
    planes = -(-codes.shape[axis] // per_byte)
    padding = [(0, planes * per_byte - n if a == axis else 0, 0) for a, n in enumerate(codes.shape)]
    full = lax.pad(_to_bits(codes, form), np.uint8(0), padding)
    out = lax.slice_in_dim(full, 0, planes, axis=axis)
    for plane in range(1, per_byte):
        part = lax.slice_in_dim(full, plane * planes, (plane + 1) * planes, axis=axis)
        out = lax.bitwise_or(out, lax.shift_left(part, np.uint8(plane * form.bits)))
    return out


def unpack(stored: jax.Array, form: Format, axis: int, length: int) -> jax.Array:
    """Return the codes that `pack` was given: `length` of them along `axis`.

    >>> from jaxq.numbers.formats import Int
    >>> unpack(jnp.array([49, 15], jnp.uint8), Int(4), 0, 3).tolist()
    [1, -1, 3]
    """
    axis %= stored.ndim
    planes = [_plane(stored, form, number) for number in range(_per_byte(form.bits))]
    return lax.slice_in_dim(lax.concatenate(planes, axis), 0, length, axis=axis)


def byte_of(code: int, form: Format) -> int:
    """Return the byte that holds `code` in every place: what to fill packed codes with.

    >>> from jaxq.numbers.formats import Int
    >>> byte_of(1, Int(4)), byte_of(-1, Int(2))
    (17, 255)
    """
    bits = int(code > 0) if isinstance(form, Binary) else code % 2**form.bits
    return sum(bits << plane * form.bits for plane in range(_per_byte(form.bits)))


def _to_bits(codes: jax.Array, form: Format) -> jax.Array:
    """Return two's complement in the low bits of a uint8; an index is its own bits, and of a sign 1 is the positive."""
    if isinstance(form, Binary):
        return lax.convert_element_type(lax.gt(codes, np.int8(0)), jnp.uint8)
    return lax.bitwise_and(lax.convert_element_type(codes, jnp.uint8), np.uint8(2**form.bits - 1))


def _plane(stored: jax.Array, form: Format, number: int) -> jax.Array:
    """Return the codes in the bits of every byte that plane `number` has."""
    width, low = form.bits, number * form.bits
    if form.storage == jnp.int8 and not isinstance(form, Binary):
        # Up to the top of the byte and down again with the sign.
        signed = lax.bitcast_convert_type(stored, jnp.int8)
        return lax.shift_right_arithmetic(lax.shift_left(signed, np.int8(8 - width - low)), np.int8(8 - width))
    bits = lax.bitwise_and(lax.shift_right_logical(stored, np.uint8(low)), np.uint8(2**width - 1))
    if not isinstance(form, Binary):
        return lax.convert_element_type(bits, form.storage)
    return lax.sub(lax.mul(lax.convert_element_type(bits, jnp.int8), np.int8(2)), np.int8(1))


def best_axis(shape: Sequence[int], width: int) -> int | None:
    """Return the axis to pack along: the one that wastes least, and the last of those.

    None where there is no axis, or where the width does not divide a byte.
    """
    if width not in PACKED_BITS or not shape or 0 in shape:
        return None
    per_byte = _per_byte(width)

    def waste(axis: int) -> float:
        return -(-shape[axis] // per_byte) * per_byte / shape[axis]

    return min(range(len(shape)), key=lambda axis: (waste(axis), -axis))


def _per_byte(width: int) -> int:
    if width not in PACKED_BITS:
        raise ValueError(f"codes of {width} bits do not divide a byte; 1, 2 and 4 do")
    return 8 // width
