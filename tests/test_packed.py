"""Products with packed matrices: equal to those with the dequantized ones, on every grid."""

from dataclasses import replace

import pytest
import torch
from test_grids import same
from torch import Tensor

from grokquant.formats import FORMATS, words
from grokquant.formats.words import pack_with_torch, unpack_words
from grokquant.grids import GRIDS, Scheme
from grokquant.methods.rtn import quantize_rtn
from grokquant.runtime.dequantize import dequantize, product_with_rows
from grokquant.runtime.matrix_cache import MatrixCache
from grokquant.runtime.products import (
    kernel_bytes,
    kernel_is_quicker,
    kernel_takes,
    prepare,
    product,
)
from grokquant.types import QTensor

ROWS = 1056  # more than are converted at once, and no multiple of them
COLUMNS = 512
INTEGERS = [
    Scheme(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (32, 128, 256, None)
    for symmetric in (True, False)
]
NAMED = [GRIDS[name].scheme for name in ("q8_0", "q4_0", "q4_1", "q4_k", "llm_int8")]


def matrix(scheme: Scheme) -> QTensor:
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(ROWS, COLUMNS, generator=generator).mul_(0.02)
    return quantize_rtn(W, scheme, "absmax")


def unrounded(quantized: QTensor) -> Tensor:
    offsets = None if quantized.offsets is None else quantized.offsets.float()
    return replace(quantized, scales=quantized.scales.float(), offsets=offsets).dequantize()


@pytest.mark.parametrize("scheme", INTEGERS + NAMED, ids=str)
def test_the_kernel_multiplies_with_the_codes(scheme):
    quantized = matrix(scheme)
    x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(2))
    W = unrounded(quantized)
    found = product(x, prepare(quantized, torch.float32))
    assert torch.allclose(found, x @ W.T, rtol=1e-5, atol=1e-5)
    in_bf16 = product(x.bfloat16(), prepare(quantized, torch.bfloat16)).float()
    wanted = x.bfloat16().float() @ W.T
    assert (in_bf16 - wanted).norm() < 4e-3 * wanted.norm()  # bfloat16 has 2^-8


@pytest.mark.parametrize("scheme", INTEGERS + NAMED, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_memory_is_known_before(scheme, dtype):
    parts = prepare(matrix(scheme), dtype)
    expected = kernel_bytes(scheme, (ROWS, COLUMNS), dtype)
    assert sum(part.nbytes for part in parts.values()) == expected


@pytest.mark.parametrize("name", ["nf4", "fp4", "iq4_nl", "iq4_xs", "q6_k", "q3_k", "q2_k"])
def test_grids_without_a_kernel(name):
    """Tables of values, and groups of 16."""
    assert not kernel_takes(GRIDS[name].scheme, (ROWS, COLUMNS), ROWS * COLUMNS)


def test_twice_as_many_tokens_are_many_where_there_are_two_planes():
    few = {scheme.bits: kernel_is_quicker(scheme, 16) for scheme in (Scheme(4, 32), Scheme(8, 32))}
    assert few == {4: True, 8: False}
    assert kernel_is_quicker(Scheme(8, 32), 15) and not kernel_is_quicker(Scheme(4, 32), 32)


def test_shapes_without_a_kernel():
    assert kernel_takes(Scheme(4, 32), (16, 64), 16 * 36)
    assert not kernel_takes(Scheme(4, 32), (24, 64), 24 * 36)
    assert not kernel_takes(Scheme(4, 16), (16, 64), 16 * 40)


def test_a_form_that_takes_too_much_memory_is_not_used():
    """q5_k needs two planes of 4 bits."""
    scheme = GRIDS["q5_k"].scheme
    assert not kernel_takes(scheme, (ROWS, COLUMNS), ROWS * COLUMNS * 11 // 16)


@pytest.mark.parametrize("scheme", INTEGERS + [grid.scheme for grid in GRIDS.values()], ids=str)
def test_rows_are_rounded_once(scheme):
    quantized = matrix(scheme)
    part = slice(70, 700)
    wanted = unrounded(quantized)[part]
    assert torch.equal(dequantize(quantized.rows(part), torch.bfloat16), wanted.bfloat16())
    in_float32 = dequantize(quantized.rows(part), torch.float32)
    assert torch.equal(in_float32, quantized.dequantize()[part].float())


STORED = [
    (name, scheme)
    for name, form in FORMATS.items()
    for scheme in [
        *(replace(scheme, scale_dtype=form.scale_dtype) for scheme in INTEGERS),
        *(grid.scheme for grid in GRIDS.values()),
    ]
]
HELD = [(name, s) for name, s in STORED if not FORMATS[name].refusal(s, (ROWS, COLUMNS))]


@pytest.mark.parametrize(("name", "scheme"), HELD, ids=str)
@pytest.mark.parametrize("some", [slice(0, 32), slice(544, ROWS)])
def test_some_rows_are_unpacked_alone(name, scheme, some):
    quantized = matrix(scheme)
    form = FORMATS[name]
    packed = form.pack("x.weight", quantized)
    assert same(form.unpack("x.weight", packed, scheme, some), quantized.rows(some))


@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(8, None), GRIDS["nf4"].scheme], ids=str)
def test_many_tokens_are_multiplied_with_tiles(scheme):
    quantized = matrix(scheme)
    x = torch.randn(40, COLUMNS, generator=torch.Generator().manual_seed(2)).bfloat16()
    W = unrounded(quantized).bfloat16()
    seen: list[int] = []

    def rows(part: slice, memory: Tensor | None) -> Tensor:
        tile = dequantize(quantized.rows(part), torch.bfloat16, memory)
        seen.append(len(tile))
        return tile

    found = product_with_rows(x, (ROWS, COLUMNS), rows)
    assert sum(seen) == ROWS and max(seen) < ROWS
    assert found.is_contiguous()
    wanted = x.float() @ W.float().T
    assert (found.float() - wanted).norm() < 4e-3 * wanted.norm()  # bfloat16 has 2^-8


def test_words_are_unpacked_as_torch_does():
    codes = torch.randint(-8, 8, (7, 48), dtype=torch.int8)
    packed = pack_with_torch(codes, 4)
    assert torch.equal(unpack_words(packed, 4), codes)
    unsigned = packed.flatten().view(torch.uint8)
    assert torch.equal(words._unpack_with_torch(unsigned, 4).view(7, 48), codes)


def test_the_cache_drops_what_was_used_longest_ago():
    cache = MatrixCache(limit=250)
    read: list[str] = []

    def use(name: str, size: int = 100) -> None:
        def load() -> dict[str, Tensor]:
            read.append(name)
            return {"codes": torch.zeros(size, dtype=torch.uint8)}

        cache.get(name, 7, size, load)

    for name in "ababcab":
        use(name)
    assert read == ["a", "b", "c", "a", "b"] and cache.nbytes == 200
    assert (cache.hits, cache.misses, cache.bytes_read) == (2, 5, 35)
    use("larger than the limit", 300)
    assert list(cache.held) == ["larger than the limit"] and cache.nbytes == 300
    cache.clear()
    assert cache.nbytes == 0
