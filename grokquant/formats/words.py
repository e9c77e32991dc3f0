"""Integer codes of 4 or 8 bits in int32 words along their rows, the first in the lowest bits.

    bits     31 .. 28   27 .. 24   23 .. 20   19 .. 16   15 .. 12   11 .. 8   7 .. 4   3 .. 0
    4 bits   code 7     code 6     code 5     code 4     code 3     code 2    code 1   code 0
    8 bits   code 3 ------------   code 2 ------------   code 1 -----------   code 0 --------

Codes are offset to unsigned. On CPUs they are packed in one pass, even where they lie by columns.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from grokquant.threads import in_pieces, slices

# The blocks in which columns become rows: 32 KB of words each, which stay in the cache.
_ROWS = 512
_COLUMNS = 64
# Of packed codes, for one thread at a time.
_BYTES = 1 << 20
# The highest bits of eight codes: flipping it adds 128 to an int8.
_HIGH_BITS = np.uint64(0x8080808080808080)
_u64 = np.uint64
_compiled = njit(nogil=True, cache=True)


def pack_words(codes: Tensor, bits: int, words: Tensor) -> None:
    """Fills contiguous int32 words [rows, n * bits / 32] from int8 codes [rows, n]."""
    by_columns = codes.stride(0) == 1 and len(codes) > 1
    if codes.device.type != "cpu":
        words.copy_(pack_with_torch(codes, bits))
    elif bits == 8 and by_columns and codes.shape[1] % 8 == 0:
        stride = codes.stride(1)
        columns = codes.shape[1]
        flat = codes.T.as_strided(((columns - 1) * stride + len(codes),), (1,))
        _pack_columns(flat.numpy().view(np.uint8), stride, columns, words.numpy().view(np.uint64))
    elif bits == 8:
        _offset_int8(codes.contiguous().numpy().view(np.uint32).ravel(), words.view(-1).numpy())
    else:
        pairs = codes.contiguous().view(-1).numpy().view(np.uint16)
        _pack_nibbles(pairs, words.view(-1).numpy().view(np.uint8))


def pack_with_torch(codes: Tensor, bits: int) -> Tensor:
    """The words in torch operations, on the device of `codes`."""
    unsigned = codes.contiguous().view(torch.uint8) + (1 << (bits - 1))  # wraps modulo 256
    if bits == 4:
        unsigned = unsigned & 15
        unsigned = unsigned[:, ::2] | (unsigned[:, 1::2] << 4)
    return unsigned.contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, words] to int8 codes [rows, words * 32 / bits]."""
    unsigned = words.flatten().view(torch.uint8)
    if bits == 4 and words.device.type == "cpu":
        codes = torch.empty(len(unsigned) * 2, dtype=torch.int8)
        pairs = codes.view(torch.int16).numpy().view(np.uint16)
        packed = unsigned.numpy()
        pieces = slices(0, len(packed), _BYTES)
        in_pieces(lambda piece: _unpack_nibbles(packed[piece], pairs[piece]), pieces)
        return codes.view(len(words), -1)
    return _unpack_with_torch(unsigned, bits).view(len(words), -1)


def _unpack_with_torch(unsigned: Tensor, bits: int) -> Tensor:
    """uint8 to int8 codes in torch operations, on the device of `unsigned`."""
    if bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=-1)
    return (unsigned - (1 << (bits - 1))).view(torch.int8)


def _offset_int8(codes: np.ndarray, words: np.ndarray) -> None:
    np.bitwise_xor(codes, np.uint32(0x80808080), out=words.view(np.uint32))


@_compiled
def _pack_nibbles(pairs, packed):
    """uint16 pairs of codes to uint8; flipping the highest bit adds 8 to a code."""
    for i in range(len(pairs)):
        packed[i] = np.uint8((pairs[i] & 15) | ((pairs[i] >> 4) & 0xF0)) ^ np.uint8(0x88)


@_compiled
def _unpack_nibbles(packed, pairs):
    """uint8 to uint16 pairs of codes. Two nibbles move apart, then each loses 8 modulo 256:

    0x00ba -> 0x0b0a -> (b - 8) << 8 | (a - 8)
    """
    for i in range(len(packed)):
        byte = np.uint16(packed[i])
        apart = np.uint16((byte | (byte << np.uint16(4))) & np.uint16(0x0F0F))
        # x ^ 8 is x - 8 or, for x below 8, x + 8: then 0xF0 in front makes it x - 8.
        below = np.uint16((apart ^ np.uint16(0x0808)) & np.uint16(0x0808))
        pairs[i] = np.uint16((apart ^ np.uint16(0x0808)) | np.uint16(below * np.uint16(0x1E)))


@_compiled
def _four(codes, at, stride, count):
    """Four columns of `count` rows, the first of which begins at `at`."""
    return (
        codes[at : at + count],
        codes[at + stride : at + stride + count],
        codes[at + 2 * stride : at + 2 * stride + count],
        codes[at + 3 * stride : at + 3 * stride + count],
    )


@_compiled
def _joined(columns, n):
    """The four codes of row n in the low half of a word."""
    a, b, c, d = columns
    low = _u64(a[n]) | (_u64(b[n]) << _u64(8))
    high = _u64(c[n]) | (_u64(d[n]) << _u64(8))
    return low | (high << _u64(16))


@_compiled
def _pack_columns(codes, stride, columns, words):
    """uint8 `codes` whose columns begin `stride` apart, to rows of uint64 words of eight codes."""
    block = np.empty((_COLUMNS // 8, _ROWS), _u64)
    for first in range(0, len(words), _ROWS):
        rows = min(_ROWS, len(words) - first)
        for column in range(0, columns, _COLUMNS):
            count = min(_COLUMNS, columns - column) // 8
            for word in range(count):
                line = block[word]
                at = (column + 8 * word) * stride + first
                low = _four(codes, at, stride, rows)
                high = _four(codes, at + 4 * stride, stride, rows)
                for n in range(rows):
                    joined = _joined(low, n) | (_joined(high, n) << _u64(32))
                    line[n] = joined ^ _HIGH_BITS
            for n in range(rows):
                row = words[first + n, column // 8 : column // 8 + count]
                for word in range(count):
                    row[word] = block[word, n]
