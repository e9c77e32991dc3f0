"""Our own products with codes on CPUs, of up to 4 bits and of 8.

With AVX512-BF16 they multiply bfloat16 in bfloat16. Few tokens are multiplied with the codes, which
are exact, or with values of a table, rounded, and the sums of groups with scales; many with weights
that are dequantized and rounded as `dequantize` does. With AMX, tiles are multiplied, of two tokens
and more. Elsewhere they serve what torch has no kernel for: tables, and 8 bits in groups.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grokquant.grids import SCALE_DTYPES, Scheme
from grokquant.runtime import tile_products
from grokquant.runtime.block_products import (
    COLUMNS,
    DENSE_CHUNKS,
    HEIGHT,
    TILE,
    bits,
    in_pairs,
    multiply,
    multiply_many,
    pack_halves,
    padded,
)
from grokquant.runtime.matrix_cache import Parts
from grokquant.runtime.tile_products import MULTIPLIES_TILES
from grokquant.runtime.vectors import LANES, MULTIPLIES_BFLOAT16
from grokquant.threads import in_pieces, slices
from grokquant.types import QTensor

# From here on dequantizing a tile once is quicker than unpacking codes for every eight tokens: of
# 8 bits and of groups of 32 from 40 on, of 4 bits in groups of 128 from 80 on; the same with AMX.
_MANY_TOKENS = 48
# Tokens at a time: 512 at once take longer than dequantizing the matrix for each 128 of them.
_MOST_TOKENS = 128
# A thread that other work delays leaves pieces to the rest.
_PIECES_OF_A_THREAD = 4
_PLACES = 16  # of a table
# Of smaller groups, scales take as much memory as codes.
_GROUP_MULTIPLE = 32


def takes_bfloat16(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether the kernel can multiply a matrix [out, in] with bfloat16 tokens on this CPU."""
    return MULTIPLIES_BFLOAT16 and dtype == torch.bfloat16 and _fits(scheme, shape)


def takes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether it can and torch has no kernel."""
    return _fits(scheme, shape) and (bool(scheme.row.table) or scheme.bits > 4)


def held_bytes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """The bytes of what `prepare` returns."""
    rows, columns = shape
    code_bytes = columns // 2 if _in_halves(scheme) else columns
    levels = scheme.groups(columns) * (1 if scheme.symmetric else 2)
    table_bytes = _PLACES * torch.float32.itemsize if _in_halves(scheme) else 0
    return rows * (code_bytes + levels * _level_dtype(scheme, dtype).itemsize) + table_bytes


def prepare(quantized: QTensor, dtype: torch.dtype) -> Parts:
    """As `block_products` has them: `codes`, perhaps a `table`, and `levels` [blocks, groups, 1 or
    2, 16]."""
    scheme = quantized.scheme
    held = {"codes": _in_blocks(quantized.codes, scheme)}
    if _in_halves(scheme):
        held["table"] = _table(scheme)
    scales = quantized.scales.float() * scheme.row.unit  # (out, groups)
    levels = [scales] if scheme.symmetric else [scales, _zeros(quantized, scales)]
    by_lanes = torch.stack(levels).unflatten(1, (-1, LANES)).permute(1, 3, 0, 2)
    held["levels"] = by_lanes.to(_level_dtype(scheme, dtype)).contiguous()
    return held


def product(x: Tensor, held: Parts) -> Tensor:
    """x [tokens, in] times a prepared matrix: [tokens, out], summed in float32."""
    in_tiles = MULTIPLIES_TILES and x.dtype == torch.bfloat16 and len(x) > 1
    one = _product_in_tiles if in_tiles else _product
    if len(x) <= _MOST_TOKENS:
        return one(x.detach(), held)
    return torch.cat([one(some, held) for some in x.detach().split(_MOST_TOKENS)])


def _product(x: Tensor, held: Parts) -> Tensor:
    """The same for tokens that the cache holds."""
    in_bfloat16 = MULTIPLIES_BFLOAT16 and x.dtype == torch.bfloat16
    many = in_bfloat16 and len(x) >= _MANY_TOKENS
    inputs = x if in_bfloat16 else x.float()
    tokens = padded(len(x), many)
    if tokens > len(x):
        inputs = F.pad(inputs, (0, 0, 0, tokens - len(x)))
    matrix = _matrix(held)
    pairs = in_pairs(inputs)
    out = inputs.new_empty(tokens, _rows(held))
    sums = None if many else _sums(inputs, held)

    def work(part: slice) -> None:
        if many:
            dense = inputs.new_empty(HEIGHT, DENSE_CHUNKS, COLUMNS * LANES)
            totals = np.empty((tokens, HEIGHT * LANES), np.float32)
            multiply_many(*matrix, pairs, bits(dense), totals, bits(out), part.start, part.stop)
        else:
            multiply(*matrix, pairs, sums, bits(out), part.start, part.stop)

    _in_pieces_of_blocks(work, held)
    return out[: len(x)].to(x.dtype)


def _product_in_tiles(x: Tensor, held: Parts) -> Tensor:
    """The same by AMX."""
    many = len(x) >= _MANY_TOKENS
    matrix = _matrix(held)
    tiles = tile_products.in_tiles(x)
    out = x.new_empty(len(x), _rows(held))
    sums = None if many else _sums(x, held)

    def work(part: slice) -> None:
        if many:
            dense, totals = tile_products.memory(len(tiles))
            tile_products.multiply_many(
                *matrix, tiles, dense, totals, bits(out), part.start, part.stop
            )
        else:
            tile_products.multiply(*matrix, tiles, sums, bits(out), part.start, part.stop)

    _in_pieces_of_blocks(work, held)
    return out


def _matrix(held: Parts) -> tuple[np.ndarray | None, np.ndarray, np.ndarray, np.ndarray | None]:
    """(table, codes, scales, zeros) of a prepared matrix."""
    parts = {name: bits(part) for name, part in held.items()}
    levels = parts["levels"]
    zeros = levels[:, :, 1] if levels.shape[2] > 1 else None
    return parts.get("table"), parts["codes"], levels[:, :, 0], zeros


def _rows(held: Parts) -> int:
    return len(held["levels"]) * LANES


def _in_pieces_of_blocks(work: Callable[[slice], None], held: Parts) -> None:
    blocks = len(held["levels"])
    in_pieces(work, slices(0, blocks, _blocks_at_once(blocks)))


def _fits(scheme: Scheme, shape: tuple[int, int]) -> bool:
    rows, columns = shape
    group_size = scheme.group_size or columns
    whole = columns % group_size == 0 and group_size % _GROUP_MULTIPLE == 0
    return whole and rows % LANES == 0 and scheme.bits <= 8


def _blocks_at_once(blocks: int) -> int:
    """Those of one piece of work."""
    threads = torch.get_num_threads()
    pieces = 1 if threads == 1 else threads * _PIECES_OF_A_THREAD
    return -(-blocks // (pieces * TILE)) * TILE


def _in_halves(scheme: Scheme) -> bool:
    return scheme.bits <= 4


def _level_dtype(scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
    """The file's where nothing is lost. Scales and zeros of 4 bits are as exact as the tokens if
    these are in bfloat16: in float32 they would take a third of the matrix."""
    if scheme.symmetric and scheme.row.unit == 1:
        return SCALE_DTYPES[scheme.scale_dtype]
    rounded = _in_halves(scheme) and dtype == torch.bfloat16
    return torch.bfloat16 if rounded else torch.float32


def _in_blocks(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes int8 [out, in] in the order of `block_products`."""
    rows, columns = codes.shape
    blocks, chunks = rows // LANES, columns // COLUMNS
    if _in_halves(scheme):
        packed = torch.empty(blocks, chunks, 4 * LANES, dtype=torch.uint8)
        pack_halves(codes.contiguous().numpy(), packed.numpy().view(np.uint32))
        return packed
    pairs = codes.contiguous().view(torch.int16).unflatten(0, (blocks, LANES))
    return pairs.transpose(1, 2).contiguous().view(torch.int8).view(blocks, chunks, -1)


def _table(scheme: Scheme) -> Tensor:
    """What codes of 4 bits are worth, float32 [16] by their places."""
    if scheme.row.table:
        return torch.tensor(scheme.row.table)
    places = torch.arange(_PLACES, dtype=torch.float32)
    if scheme.qmin == 0:
        return places - _middle(scheme)  # what the zeros add again
    return torch.where(places > scheme.qmax, places - _PLACES, places)


def _middle(scheme: Scheme) -> int:
    """The code that a group's zero is the value of: least is lost where that is small."""
    moves = _in_halves(scheme) and scheme.qmin == 0 and not scheme.symmetric
    return 1 << (scheme.bits - 1) if moves else 0


def _zeros(quantized: QTensor, scales: Tensor) -> Tensor:
    """[out, groups] of float32."""
    points = 0 if quantized.zero_points is None else quantized.zero_points.float()
    zeros = scales * (_middle(quantized.scheme) - points)
    return zeros if quantized.offsets is None else zeros + quantized.offsets.float()


def _sums(x: Tensor, held: Parts) -> np.ndarray | None:
    """Those of x [tokens, in] in groups of columns, float32 [groups, tokens], if there are zeros
    that they are multiplied with."""
    groups, levels = held["levels"].shape[1:3]
    if levels == 1:
        return None
    return x.float().unflatten(1, (groups, -1)).sum(dim=2).T.contiguous().numpy()
