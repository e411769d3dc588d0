"""Codes of 4 and 8 bits in int32 words, as compressed-tensors and its readers pack them.

Word j of a row holds codes 8 j, 8 j + 1, ... (4 j, ... for 8 bits) from its lowest bits up, each plus `2^(bits - 1)`,
so that a word is made of unsigned fields. Missing codes at the end are fields of zero.
compressed_tensors/compressors/pack_quantized.
"""

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return signed codes as words: int8 [n, m] -> int32 [n, ceil(m * bits / 32)].

    >>> [hex(word) for word in pack(np.array([[-8, -7, 0, 7, -8, -8, -8, -1]], np.int8), 4)[0]]
    ['0x7000f810']
    """
    per_word = 32 // bits
    fields = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint32)
    fields = np.pad(fields, ((0, 0), (0, -codes.shape[1] % per_word))).reshape(len(codes), -1, per_word)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    return np.bitwise_or.reduce(fields << shifts, axis=2).view(np.int32)


def unpack(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """Return the first `length` codes of every row that `pack` was given: int8 [n, length].

    >>> unpack(np.array([[0x7000F810]], np.int32), 4, 3).tolist()
    [[-8, -7, 0]]
    """
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    fields = words.view(np.uint32)[:, :, None] >> shifts & np.uint32(2**bits - 1)
    return (fields.reshape(len(words), -1)[:, :length].astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
