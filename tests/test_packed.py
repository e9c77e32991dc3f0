"""Products with packed matrices: equal to those with the dequantized ones, on every grid."""

from dataclasses import replace

import pytest
import torch
from test_grids import same
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from grokquant.formats import FORMATS, words
from grokquant.formats.words import pack_with_torch, unpack_words
from grokquant.grids import GRIDS, Scheme
from grokquant.methods.rtn import quantize_rtn
from grokquant.runtime import codes_kernel
from grokquant.runtime.dequantize import dequantize, product_with_rows
from grokquant.runtime.matrix_cache import MatrixCache
from grokquant.runtime.packed import PackedMatrix
from grokquant.runtime.products import KERNELS, Kernel, kernel_for
from grokquant.runtime.tile_products import MULTIPLIES_TILES
from grokquant.runtime.vectors import MULTIPLIES_BFLOAT16
from grokquant.types import QTensor, TensorRef

ROWS = 1056  # more than are converted at once, and no multiple of them
COLUMNS = 512
INTEGERS = [
    Scheme(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (32, 128, 256, None)
    for symmetric in (True, False)
]
NAMED = [
    GRIDS[name].scheme
    for name in (
        "q8_0",
        "q4_0",
        "q4_1",
        "q4_k",
        "q5_k",
        "llm_int8",
        "nf4",
        "fp4",
        "iq4_nl",
        "iq4_xs",
    )
]


EXACT = [Scheme(4, 128), Scheme(8, None)] + [GRIDS[name].scheme for name in ("q8_0", "iq4_nl")]
needs_bfloat16 = pytest.mark.skipif(not MULTIPLIES_BFLOAT16, reason="the CPU has no AVX512-BF16")


@pytest.fixture(params=[False, True], ids=["vectors", "tiles"])
def instructions(request, monkeypatch):
    """Those that CPUs have, and those that AMX adds."""
    if request.param and not MULTIPLIES_TILES:
        pytest.skip("the CPU has no AMX")
    monkeypatch.setattr(codes_kernel, "MULTIPLIES_TILES", request.param)


on_both = pytest.mark.usefixtures("instructions")


def matrix(scheme: Scheme) -> QTensor:
    return matrix_of((ROWS, COLUMNS), scheme)


def matrix_of(shape: tuple[int, int], scheme: Scheme) -> QTensor:
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(shape, generator=generator).mul_(0.02)
    return quantize_rtn(W, scheme, "absmax")


def unrounded(quantized: QTensor) -> Tensor:
    offsets = None if quantized.offsets is None else quantized.offsets.float()
    return replace(quantized, scales=quantized.scales.float(), offsets=offsets).dequantize()


def kernel(
    scheme: Scheme,
    shape: tuple[int, int] = (ROWS, COLUMNS),
    stored_bytes: int = 1 << 30,
    dtype: torch.dtype = torch.bfloat16,
) -> Kernel | None:
    return kernel_for(scheme, shape, stored_bytes, "cpu", dtype)


def kernels(scheme: Scheme, dtype: torch.dtype) -> list[Kernel]:
    """All those for CPUs that take a matrix; which one comes first depends on the CPU."""
    found = [k for k in KERNELS if k.device == "cpu" and k.takes(scheme, (ROWS, COLUMNS), dtype)]
    assert found
    return found


def kernel_bits(scheme: Scheme) -> int:
    """What codes of a scheme take as their kernel holds them."""
    return 4 if scheme.bits <= 4 else 8


@on_both
@pytest.mark.parametrize("tokens", [1, 7, 11])  # one, eight, eight and four at a time
@pytest.mark.parametrize("scheme", INTEGERS + NAMED, ids=str)
def test_the_kernel_multiplies_with_the_codes(scheme, tokens):
    quantized = matrix(scheme)
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(2))
    W = unrounded(quantized)
    for ours in kernels(scheme, torch.float32):
        found = ours.product(x, ours.prepare(quantized, torch.float32))
        assert torch.allclose(found, x @ W.T, rtol=1e-5, atol=1e-5)
    for ours in kernels(scheme, torch.bfloat16):
        in_bf16 = ours.product(x.bfloat16(), ours.prepare(quantized, torch.bfloat16)).float()
        wanted = x.bfloat16().float() @ W.T
        assert in_bf16.shape == (tokens, ROWS)
        assert (in_bf16 - wanted).norm() < 4e-3 * wanted.norm()  # bfloat16 has 2^-8


@pytest.mark.parametrize("name", ["q8_0", "nf4", "q4_k"])
def test_cpus_without_bfloat16_multiply_it_too(name, monkeypatch):
    monkeypatch.setattr(codes_kernel, "MULTIPLIES_BFLOAT16", False)
    monkeypatch.setattr(codes_kernel, "MULTIPLIES_TILES", False)
    quantized = matrix(GRIDS[name].scheme)
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(2)).bfloat16()
    ours = kernel(quantized.scheme)
    found = ours.product(x, ours.prepare(quantized, torch.bfloat16))
    wanted = x.float() @ unrounded(quantized).T
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() < 4e-3 * wanted.norm()


@on_both
@needs_bfloat16
@pytest.mark.parametrize("tokens", [2, 4, 7, 19])
@pytest.mark.parametrize("scheme", EXACT, ids=str)
def test_our_kernel_multiplies_few_tokens_with_exact_codes(scheme, tokens):
    """Those of the dequantized weights are rounded to bfloat16."""
    quantized = matrix(scheme)
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(2)).bfloat16()
    ours = kernel(scheme)
    found = ours.product(x, ours.prepare(quantized, torch.bfloat16))
    wanted = x.float() @ unrounded(quantized).T
    assert (found != wanted.bfloat16()).float().mean() < 0.001  # sums in another order


@on_both
@needs_bfloat16
@pytest.mark.parametrize(  # 2304 and 131 are more than are dequantized and multiplied at once
    ("tokens", "columns"), [(51, COLUMNS), (51, 2304), (131, COLUMNS)]
)
@pytest.mark.parametrize("scheme", [*EXACT, GRIDS["nf4"].scheme, Scheme(8, 32, False)], ids=str)
def test_our_kernel_multiplies_many_tokens_with_the_dequantized_weights(scheme, tokens, columns):
    quantized = matrix_of((80, columns), scheme)
    x = torch.randn(
        tokens, quantized.shape[1], generator=torch.Generator().manual_seed(2)
    ).bfloat16()
    ours = kernel(quantized.scheme, quantized.shape)
    found = ours.product(x, ours.prepare(quantized, torch.bfloat16))
    W = dequantize(quantized, torch.bfloat16, torch.bfloat16)
    wanted = x.float() @ W.float().T
    assert (found.float() - wanted).abs().max() < 2**-8 * wanted.abs().max()
    assert (found != wanted.bfloat16()).float().mean() < 0.02  # sums in another order


@on_both
@pytest.mark.parametrize("tokens", [1, 51])
def test_no_number_of_threads_changes_a_product(tokens):
    quantized = matrix(GRIDS["q4_k"].scheme)
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(2)).bfloat16()
    ours = kernel(quantized.scheme)
    held = ours.prepare(quantized, torch.bfloat16)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(ours.product(x, held))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@on_both
@pytest.mark.parametrize("rows", [16, 80])  # one block, and two after three
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_our_kernel_takes_rows_by_sixteens(rows, dtype):
    quantized = matrix_of((rows, 64), Scheme(8, 32))
    ours = kernel(quantized.scheme, (rows, 64))
    held = ours.prepare(quantized, dtype)
    x = torch.randn(3, 64, dtype=dtype, generator=torch.Generator().manual_seed(2))
    wanted = x.float() @ unrounded(quantized).T
    assert torch.allclose(ours.product(x, held).float(), wanted, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("scheme", INTEGERS + NAMED, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_memory_is_known_before(scheme, dtype):
    ours = kernel(scheme)
    parts = ours.prepare(matrix(scheme), dtype)
    expected = ours.held_bytes(scheme, (ROWS, COLUMNS), dtype)
    assert sum(part.nbytes for part in parts.values()) == expected
    codes = ROWS * COLUMNS * kernel_bits(scheme) // 8
    assert parts["codes"].nbytes == codes


@pytest.mark.parametrize("name", ["q6_k", "q3_k", "q2_k"])
def test_grids_without_a_kernel(name):
    """Groups of 16."""
    assert kernel(GRIDS[name].scheme) is None


def test_few_tokens_are_fewer_than_32():
    """In float32; with bfloat16 instructions all tokens are multiplied with the codes."""
    for scheme in (Scheme(4, 32), Scheme(8, 32), GRIDS["nf4"].scheme):
        ours = kernel(scheme, dtype=torch.float32)
        assert ours.is_quicker(31) and not ours.is_quicker(32)
        if MULTIPLIES_BFLOAT16:
            assert kernel(scheme).is_quicker(1 << 20)


def test_shapes_without_a_kernel():
    assert kernel(Scheme(4, 32), (16, 256), 16 * 144)
    assert kernel(Scheme(4, 32), (24, 256), 24 * 144) is None
    assert kernel(Scheme(4, 16), (16, 256), 16 * 160) is None
    assert kernel(Scheme(8, 32), (16, 64), 16 * 68)
    assert kernel(Scheme(8, 32), (24, 64), 24 * 68) is None
    assert kernel(Scheme(8, 16), (16, 64), 16 * 72) is None


@pytest.mark.parametrize("name", [*(n for n in GRIDS if n != "integer")])
def test_a_form_that_takes_too_much_memory_is_not_used(name):
    """Codes of 2, 3, 5 and 6 bits take 4 or 8 there."""
    scheme = GRIDS[name].scheme
    stored = (
        ROWS * scheme.groups(COLUMNS) * scheme.group_bits // 8 + ROWS * COLUMNS * scheme.bits // 8
    )
    assert bool(kernel(scheme, stored_bytes=stored)) == (scheme.bits in (4, 8))


@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(4, 32, False), Scheme(3, None)], ids=str)
def test_cuda_takes_codes_of_4_bits_in_bfloat16(scheme):
    """By torch's rules on shapes and dtypes; no GPU was at hand."""
    shape = (64, 256)
    assert kernel_for(scheme, shape, 1 << 30, "cuda", torch.float32) is None
    on_cuda = kernel_for(scheme, shape, 1 << 30, "cuda", torch.bfloat16)
    assert on_cuda in KERNELS and on_cuda.device == "cuda" and on_cuda.is_quicker(10_000)
    quantized = matrix_of(shape, scheme)
    with FakeTensorMode(allow_non_fake_inputs=True):
        held = on_cuda.prepare(quantized.each(torch.empty_like), torch.bfloat16)
        out = on_cuda.product(torch.empty(5, 256, dtype=torch.bfloat16), held)
    assert out.shape == (5, 64)
    expected = on_cuda.held_bytes(scheme, shape, torch.bfloat16)
    assert sum(part.nbytes for part in held.values()) == expected


def test_cuda_takes_no_other_codes():
    for scheme in (Scheme(8, 128), GRIDS["nf4"].scheme, Scheme(4, 16)):
        assert kernel_for(scheme, (64, 256), 1 << 30, "cuda", torch.bfloat16) is None


@pytest.mark.parametrize("scheme", INTEGERS + [grid.scheme for grid in GRIDS.values()], ids=str)
def test_rows_are_rounded_once(scheme):
    quantized = matrix(scheme)
    part = slice(70, 700)
    wanted = unrounded(quantized)[part]
    in_bf16 = dequantize(quantized.rows(part), torch.float16, torch.bfloat16)
    assert torch.equal(in_bf16, wanted.bfloat16())
    for computed in (torch.float16, torch.float32):
        in_float32 = dequantize(quantized.rows(part), computed, torch.float32)
        assert torch.equal(in_float32, quantized.dequantize(computed)[part].float())


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
        tile = dequantize(quantized.rows(part), torch.bfloat16, torch.bfloat16, memory)
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


def packed_matrix(scheme: Scheme, form: str, dtype: torch.dtype) -> PackedMatrix:
    """A matrix as a checkpoint whose weights are computed in `dtype` gives it."""
    quantized = matrix(scheme)
    parts = FORMATS[form].pack("x.weight", quantized)
    stored = sum(part.nbytes for part in parts.values())
    ref = TensorRef("x.weight", (ROWS, COLUMNS), dtype, stored, lambda: quantized, scheme)
    packed = PackedMatrix(ref, FORMATS[form], dtype, MatrixCache())
    packed.open(torch.device("cpu"))
    return packed


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q6_k"])
def test_float32_multiplies_scales_of_float16_in_float32(name, tokens):
    """As llama.cpp does, and `load` with packed=False."""
    packed = packed_matrix(GRIDS[name].scheme, "gguf", torch.float32)
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(2))
    wanted = x @ packed.ref.read().T
    assert torch.allclose(packed.product(x), wanted, rtol=1e-5, atol=1e-5)
    rounded = x @ packed.ref.read_quantized().dequantize(torch.float16).float().T
    assert name == "q6_k" or not torch.allclose(rounded, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_few_tokens_have_a_gradient(name):
    """Kernels have none, so that such a product takes the dense way."""
    packed = packed_matrix(GRIDS[name].scheme, "gguf", torch.float32)
    x = torch.randn(2, COLUMNS, requires_grad=True)
    packed.product(x).sum().backward()
    wanted = packed.dense(torch.float32).sum(0).expand(2, -1)
    assert torch.allclose(x.grad, wanted, rtol=1e-4, atol=1e-4)


def test_a_table_in_groups_of_no_whole_registers():
    scheme = replace(GRIDS["nf4"].scheme, group_size=8)
    quantized = matrix_of((4, 64), scheme)
    assert torch.equal(
        dequantize(quantized, torch.float32, torch.bfloat16), unrounded(quantized).bfloat16()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_tiles_of_bfloat16_have_memory_of_their_own(dtype):
    """The others are made anew, so that memory for them would be taken in vain."""
    given: list[bool] = []

    def rows(part: slice, memory: torch.Tensor | None) -> torch.Tensor:
        given.append(memory is not None)
        return torch.ones(part.stop - part.start, 64, dtype=dtype)

    out = product_with_rows(torch.ones(2, 64, dtype=dtype), (96, 64), rows)
    assert torch.equal(out, torch.full((2, 96), 64, dtype=dtype))
    assert set(given) == {dtype == torch.bfloat16}
