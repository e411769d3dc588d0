"""Codes of fewer than 8 bits as bytes: two of 4 bits, four of 2 or eight of 1 bit in each.

The layout is planar: along the packed axis of length n, byte j holds codes j, j + m, j + 2m, ... from its lowest bits
up, where m = ceil(n / codes per byte). So unpacking is a shift for each plane and one concatenation, not interleaved,
which every backend does at the speed of memory. Codes that do not fill the last bytes are padded with zero bits. Other
widths are cut into fields of 4, 2 and 1 bits, from the lowest up, and each field is packed so, one behind the other:
7 bits are 4 + 2 + 1. Codes of a codebook of vectors are held as one index for each vector, of up to 8 bits.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers.formats import Binary, Format, vector_length


def fields(width: int) -> Iterator[tuple[int, int]]:
    """Yield the fields of codes of `width` bits: how many bits, and at which bit they begin.

    >>> list(fields(7)), list(fields(2))
    ([(4, 0), (2, 4), (1, 6)], [(2, 0)])
    """
    low = 0
    for bits in (8, 4, 2, 1):
        if width & bits:
            yield bits, low
            low += bits


def packs(form: Format) -> bool:
    """Tell whether codes are held in fewer bytes than there are codes.

    >>> from jaxq.numbers.formats import Codebook, Int
    >>> packs(Int(7)), packs(Int(8)), packs(Codebook(256, dim=2))
    (True, False, True)
    """
    return form.bits < 8 or vector_length(form) > 1


def packed_length(count: int, form: Format) -> int:
    """Return how many bytes `count` codes take.

    >>> from jaxq.numbers.formats import Int
    >>> packed_length(16, Int(3)), packed_length(5, Int(4))
    (6, 3)
    """
    return sum(_field_length(count // vector_length(form), bits) for bits, _ in fields(form.bits))


def pack(codes: jax.Array, form: Format, axis: int) -> jax.Array:
    """Return bytes that hold codes of 1 to 7 bits, or those of vectors that run along `axis`, packed along it.

    codes: [..., n, ...] in the format's storage; result: uint8 [..., packed_length(n, form), ...]. Raises `ValueError`
    for other codes.

    >>> from jaxq.numbers.formats import Int
    >>> pack(jnp.array([1, -1, 3], jnp.int8), Int(4), 0).tolist()
    [49, 15]
    """
    _check(form)
    axis, dim = axis % codes.ndim, vector_length(form)
    if dim > 1:
        codes = lax.div(lax.slice_in_dim(codes, 0, None, dim, axis), codes.dtype.type(dim))
    return pack_indices(codes, form, axis)


def pack_indices(codes: jax.Array, form: Format, axis: int) -> jax.Array:
    """Return bytes that hold codes or, for vectors, the index of each: uint8, packed along `axis`."""
    bits = _to_bits(codes, form)
    parts = [_pack_field(bits, width, low, axis) for width, low in fields(form.bits)]
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, axis)


def unpack(stored: jax.Array, form: Format, axis: int, length: int) -> jax.Array:
    """Return the codes that `pack` was given: `length` of them along `axis`.

    >>> from jaxq.numbers.formats import Int
    >>> unpack(jnp.array([49, 15], jnp.uint8), Int(4), 0, 3).tolist()
    [1, -1, 3]
    """
    _check(form)
    axis %= stored.ndim
    codes = _unpack_fields(stored, form, axis, length // vector_length(form))
    return codes if vector_length(form) == 1 else _places(codes, form, axis)


def _places(index: jax.Array, form: Format, axis: int) -> jax.Array:
    """Return the codes of all values of vectors: `dim` times the index and the place."""
    dim = vector_length(form)
    shape = (*index.shape[: axis + 1], dim, *index.shape[axis + 1 :])
    first = lax.mul(index, index.dtype.type(dim))
    first = lax.broadcast_in_dim(first, shape, [a + (a > axis) for a in range(index.ndim)])
    codes = lax.add(first, lax.broadcasted_iota(index.dtype, shape, axis + 1))
    return lax.reshape(codes, (*index.shape[:axis], index.shape[axis] * dim, *index.shape[axis + 1 :]))


def _unpack_fields(stored: jax.Array, form: Format, axis: int, length: int) -> jax.Array:
    whole, start = None, 0
    for width, low in fields(form.bits):
        stop = start + _field_length(length, width)
        part = lax.slice_in_dim(stored, start, stop, axis=axis)
        planes = [_plane(part, form, width, number) for number in range(8 // width)]
        field = lax.slice_in_dim(lax.concatenate(planes, axis), 0, length, axis=axis)
        if width == form.bits:
            return field
        moved = lax.shift_left(field, np.uint8(low))
        whole, start = moved if whole is None else lax.bitwise_or(whole, moved), stop
    return _from_bits(whole, form)


def _field_length(count: int, width: int) -> int:
    return -(-count // (8 // width))


def _pack_field(bits: jax.Array, width: int, low: int, axis: int) -> jax.Array:
    """Return the bytes of one field of the codes' bits."""
    if width < 8:
        bits = lax.bitwise_and(lax.shift_right_logical(bits, np.uint8(low)), np.uint8(2**width - 1))
    count = 8 // width
    size = -(-bits.shape[axis] // count)
    padding = [(0, size * count - n if a == axis else 0, 0) for a, n in enumerate(bits.shape)]
    full = lax.pad(bits, np.uint8(0), padding)
    out = lax.slice_in_dim(full, 0, size, axis=axis)
    for plane in range(1, count):
        part = lax.slice_in_dim(full, plane * size, (plane + 1) * size, axis=axis)
        out = lax.bitwise_or(out, lax.shift_left(part, np.uint8(plane * width)))
    return out


def _to_bits(codes: jax.Array, form: Format) -> jax.Array:
    """Return two's complement in the low bits of a uint8; an index is its own bits, and of a sign 1 is the positive."""
    if isinstance(form, Binary):
        return lax.convert_element_type(lax.gt(codes, np.int8(0)), jnp.uint8)
    return lax.convert_element_type(codes, jnp.uint8)


def _from_bits(bits: jax.Array, form: Format) -> jax.Array:
    """Return codes from their low bits in a uint8: up to the top of the byte and down again with the sign."""
    if form.storage != jnp.int8:
        return lax.convert_element_type(bits, form.storage)
    spare = np.int8(8 - form.bits)
    return lax.shift_right_arithmetic(lax.shift_left(lax.bitcast_convert_type(bits, jnp.int8), spare), spare)


def _plane(stored: jax.Array, form: Format, width: int, number: int) -> jax.Array:
    """Return what plane `number` of a field holds: whole codes, or the bits of a part of them."""
    low = number * width
    if width == form.bits and form.storage == jnp.int8 and not isinstance(form, Binary):
        signed = lax.bitcast_convert_type(stored, jnp.int8)
        return lax.shift_right_arithmetic(lax.shift_left(signed, np.int8(8 - width - low)), np.int8(8 - width))
    bits = lax.bitwise_and(lax.shift_right_logical(stored, np.uint8(low)), np.uint8(2**width - 1))
    if not isinstance(form, Binary):
        return lax.convert_element_type(bits, form.storage if width == form.bits else jnp.uint8)
    return lax.sub(lax.mul(lax.convert_element_type(bits, jnp.int8), np.int8(2)), np.int8(1))


def best_axis(shape: Sequence[int], form: Format) -> int | None:
    """Return the axis to pack along: the one that wastes least, and the last of those.

    None where there is no axis or none gets shorter, and for vectors, which run along an axis of their own.
    """
    if not packs(form) or vector_length(form) > 1 or not shape or 0 in shape:
        return None
    best = min(range(len(shape)), key=lambda axis: (packed_length(shape[axis], form) / shape[axis], -axis))
    return best if packed_length(shape[best], form) < shape[best] else None


def _check(form: Format) -> None:
    if not packs(form):
        raise ValueError(f"codes of {form} fill bytes as they are; those of 1 to 7 bits are packed")
