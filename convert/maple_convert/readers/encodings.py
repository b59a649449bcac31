"""Weights in fewer bits than float16: how each published form is spelt out as floats.

ggml's forms keep blocks of 32 or 256 numbers, each block small integers beside one or two float16
scales; the K forms give every 16 or 32 numbers of a block a small scale of their own. A value is
``scale * q`` or ``scale * q - minimum`` in float32, which holds it to rounding; the 8-bit floats
are exact in float16.

Source   ggml-org/ggml src/ggml-common.h (block layouts) and src/ggml-quants.c (dequantize_row_*);
         OCP 8-bit floating point specification 1.0, section 5 (E4M3 without infinities, E5M2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[Any]

BLOCK, SUPER_BLOCK = 32, 256  # numbers in a block of the plain and of the K forms
_NIBBLES = np.array([0, 4], np.uint8)[:, None]
_PAIRS = np.array([0, 2, 4, 6], np.uint8)[:, None]
_BITS = np.arange(8, dtype=np.uint8)[:, None]


@dataclass(frozen=True)
class Encoding:
    """One form.

    Attributes:
        name: as its format spells it.
        elements: numbers in a block.
        nbytes: bytes of a block.
        dtype: what they are read as.
        decode: blocks (n, nbytes) to numbers (n, elements) of that dtype.
    """

    name: str
    elements: int
    nbytes: int
    dtype: str
    decode: Callable[[Bytes], Numbers]


def _halves(blocks: Bytes, at: int) -> Numbers:
    """The float16 at a byte of each block: (n, 1) float32."""
    return np.frombuffer(blocks[:, at : at + 2].tobytes(), "<f2").astype(np.float32)[:, None]


def _int8(blocks: Bytes) -> Numbers:
    return np.reshape(np.frombuffer(blocks.tobytes(), np.int8), blocks.shape)


def _super(numbers: Numbers) -> Numbers:
    """A row for each of the K forms' blocks."""
    return np.reshape(numbers, (-1, SUPER_BLOCK))


def _nibbles(packed: Bytes) -> Bytes:
    """The low halves of some bytes, then the high ones: (…, b) to (…, 2 b)."""
    apart = (packed[..., None, :] >> _NIBBLES) & np.uint8(15)
    return np.reshape(apart, (*packed.shape[:-1], -1))


def _fifth_bits(packed: Bytes) -> Bytes:
    """Bit i of 4 bytes as 0 or 16, for number i of 32."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << np.uint8(4)


def _signed(unsigned: Numbers, zero: int) -> Numbers:
    return unsigned.astype(np.float32) - np.float32(zero)


def _q4_0(blocks: Bytes) -> Numbers:
    return _halves(blocks, 0) * _signed(_nibbles(blocks[:, 2:]), 8)


def _q4_1(blocks: Bytes) -> Numbers:
    return _halves(blocks, 0) * _nibbles(blocks[:, 4:]) + _halves(blocks, 2)


def _q5_0(blocks: Bytes) -> Numbers:
    q = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _halves(blocks, 0) * _signed(q, 16)


def _q5_1(blocks: Bytes) -> Numbers:
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _halves(blocks, 0) * q + _halves(blocks, 2)


def _q8_0(blocks: Bytes) -> Numbers:
    return _halves(blocks, 0) * _int8(blocks[:, 2:])


def _two_bits(packed: Bytes) -> Bytes:
    """Two runs of 32 bytes, each 128 numbers of 2 bits, the lowest bits of all bytes first."""
    runs = np.reshape(packed, (-1, 2, 1, 32))
    return _super((runs >> _PAIRS) & np.uint8(3))


def _scaled(scales: Numbers, q: Numbers) -> Numbers:
    """Each run of numbers times its own scale: (n, runs), (n, 256) to (n, runs, 256 / runs)."""
    return scales[..., None] * np.reshape(q, (*scales.shape, -1))


def _q2_k(blocks: Bytes) -> Numbers:
    scales, q = blocks[:, :16], _two_bits(blocks[:, 16:80])
    d, minimum = _halves(blocks, 80), _halves(blocks, 82)
    low = minimum * (scales >> np.uint8(4))
    values = _scaled(d * (scales & np.uint8(15)), q) - low[..., None]
    return _super(values)


def _q3_k(blocks: Bytes) -> Numbers:
    packed = blocks[:, 96:108]
    high = np.reshape((packed[:, None, 8:] >> _PAIRS) & np.uint8(3), (-1, 16))
    scales = _signed(_nibbles(packed[:, :8]) | (high << np.uint8(4)), 32)
    # A third bit that is not set takes 4 away.
    third = _super((blocks[:, None, :32] >> _BITS) & np.uint8(1))
    q = _signed(_two_bits(blocks[:, 32:96]) | (third << np.uint8(2)), 4)
    return _super(_scaled(_halves(blocks, 108) * scales, q))


def _scales_of_eight(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight scales and eight minima of 6 bits each, from 12 bytes."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    top, four = np.uint8(6), np.uint8(4)
    scales = [first & np.uint8(63), (rest & np.uint8(15)) | (first >> top << four)]
    minima = [second & np.uint8(63), (rest >> four) | (second >> top << four)]
    return np.concatenate(scales, axis=1), np.concatenate(minima, axis=1)


def _with_minima(blocks: Bytes, q: Numbers) -> Numbers:
    """The values of Q4_K and Q5_K, whose blocks begin alike."""
    scales, minima = _scales_of_eight(blocks[:, 4:16])
    low = _halves(blocks, 2) * minima
    values = _scaled(_halves(blocks, 0) * scales, q) - low[..., None]
    return _super(values)


def _q4_k(blocks: Bytes) -> Numbers:
    return _with_minima(blocks, _nibbles(np.reshape(blocks[:, 16:], (-1, 4, 32))))


def _q5_k(blocks: Bytes) -> Numbers:
    q = _super(_nibbles(np.reshape(blocks[:, 48:], (-1, 4, 32))))
    fifth = _super((blocks[:, None, 16:48] >> _BITS) & np.uint8(1))
    return _with_minima(blocks, q | (fifth << np.uint8(4)))


def _q6_k(blocks: Bytes) -> Numbers:
    low = _super(_nibbles(np.reshape(blocks[:, :128], (-1, 2, 64))))
    q = _signed(low | (_two_bits(blocks[:, 128:192]) << np.uint8(4)), 32)
    scales = _halves(blocks, 208) * _int8(blocks[:, 192:208])
    return _super(_scaled(scales, q))


def _e4m3fn_values() -> Numbers:
    """All 256 numbers: exponent bias 7, no infinities, all ones is NaN."""
    bits = np.arange(128)
    exponent, fraction = bits >> 3, (bits & 7) / 8
    values = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float16)


_E4M3FN = _e4m3fn_values()
# The upper half of a float16, whose exponent it has.
_E5M2: Numbers = np.frombuffer((np.arange(256, dtype="<u2") << 8).tobytes(), "<f2")

GGML = {
    2: Encoding("Q4_0", BLOCK, 18, "float32", _q4_0),
    3: Encoding("Q4_1", BLOCK, 20, "float32", _q4_1),
    6: Encoding("Q5_0", BLOCK, 22, "float32", _q5_0),
    7: Encoding("Q5_1", BLOCK, 24, "float32", _q5_1),
    8: Encoding("Q8_0", BLOCK, 34, "float32", _q8_0),
    10: Encoding("Q2_K", SUPER_BLOCK, 84, "float32", _q2_k),
    11: Encoding("Q3_K", SUPER_BLOCK, 110, "float32", _q3_k),
    12: Encoding("Q4_K", SUPER_BLOCK, 144, "float32", _q4_k),
    13: Encoding("Q5_K", SUPER_BLOCK, 176, "float32", _q5_k),
    14: Encoding("Q6_K", SUPER_BLOCK, 210, "float32", _q6_k),
}
EIGHT_BITS = {
    "F8_E4M3": Encoding("F8_E4M3", 1, 1, "float16", lambda blocks: _E4M3FN[blocks]),
    "F8_E5M2": Encoding("F8_E5M2", 1, 1, "float16", lambda blocks: _E5M2[blocks]),
}
