"""Every method, grid and format: refused by name before anything is computed, or read back by the
program that the format is for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from grokquant.errors import InputError
from grokquant.files.gguf_header import TYPES
from grokquant.formats import FORMATS
from grokquant.grids import GRIDS, Scheme
from grokquant.job.plan import build_plan
from grokquant.job.unit import stored_bits
from grokquant.methods import METHODS, gptq
from grokquant.methods.copy import can_copy, copy_quantized
from grokquant.methods.gptq_leaf import PlainLeaf
from grokquant.methods.levels import FINDERS, find_levels
from grokquant.recipe import parse_recipe
from grokquant.types import QTensor, Unit

LLAMA_CPP = [name for name, grid in GRIDS.items() if grid.ggml_type is not None]
ROWS, COLUMNS = 32, 512
NAN = torch.full((1,), torch.nan, dtype=torch.float16)
STEM = "model.layers.0.mlp.up_proj"
# Integers need bits; those of 32 columns and float16 scales are Q4_0 and Q8_0 in llama.cpp.
RULES = {name: {"grid": name} for name in GRIDS if name != "integer"}
RULES |= {f"int{bits}": {"bits": bits, "group": 32} for bits in (2, 3, 4, 8)}
# Integers of these bits that formats hold. All other grids are held where their row says so.
INTEGERS = {
    "compressed-tensors": (4, 8),
    "gptq": (2, 3, 4, 8),
    "gguf": (4, 8),
}


def held(name: str, form: str) -> bool:
    if name.startswith("int"):
        return int(name.removeprefix("int")) in INTEGERS.get(form, ())
    return form in GRIDS[name].formats


def planned(name: str, form: str, method: str) -> Unit:
    """A matrix of the toy as a recipe of this grid, format and method plans it."""
    values = {
        "model": {"path": "toy"},
        "quantize": [{"match": "layers.*.experts.*", "method": method} | RULES[name]],
        "output": {"path": "out", "format": form},
    }
    return build_plan(parse_recipe(values)).units["layers.0.experts.0.gate"]


@pytest.fixture(scope="module")
def W() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, COLUMNS, generator=generator) / 50


@pytest.fixture(scope="module")
def H() -> Tensor:
    """The Hessian of inputs of very different strength [in, in]."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(COLUMNS, 800, generator=generator)
    X *= torch.rand(COLUMNS, 1, generator=generator) ** 2 + 0.05
    return X @ X.T


@dataclass
class Inputs:
    """A site with a given Hessian."""

    H: Tensor
    tokens: int = 800
    aim: None = None

    def hessian(self, block: int | None, weighted: bool = False) -> list[Tensor]:
        return [self.H.clone()]

    def once(self, key: object, make: Callable) -> object:
        return make()


def rounded(method: str, W: Tensor, H: Tensor, scheme: Scheme) -> QTensor:
    method = METHODS[method]
    return method.round(W, scheme, method.settings(), Inputs(H)).quantized


def read_by_gguf(packed: dict[str, Tensor], unit: Unit) -> Tensor:
    name = next(n for n in LLAMA_CPP if GRIDS[n].scheme == unit.scheme)
    blocks = packed["weight_blocks"].numpy()
    return torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType[name.upper()]))


def read_by_bitsandbytes(packed: dict[str, Tensor], unit: Unit) -> Tensor:
    if "SCB" in packed:
        return int8_vectorwise_dequant(packed["weight"], packed["SCB"])
    state = {name: part for name, part in packed.items() if name != "weight"}
    found = QuantState.from_dict(state, torch.device("cpu"))
    found.dtype = torch.float32
    return dequantize_4bit(packed["weight"], found)


def read_by_compressed_tensors(packed: dict[str, Tensor], unit: Unit) -> Tensor:
    config = FORMATS["compressed-tensors"].quantization_config([unit], [])
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    return PackedQuantizationCompressor.decompress(packed, scheme)["weight"].float()


def read_by_us(packed: dict[str, Tensor], unit: Unit) -> Tensor:
    """gptqmodel is asked in tests/test_gptqmodel.py."""
    named = {f"{STEM}.{name}": part for name, part in packed.items()}
    return FORMATS["gptq"].unpack(f"{STEM}.weight", named, unit.scheme).dequantize().float()


READERS = {
    "compressed-tensors": read_by_compressed_tensors,
    "gptq": read_by_us,
    "bitsandbytes": read_by_bitsandbytes,
    "gguf": read_by_gguf,
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if "grid" in m.grid_keys])
def test_a_grid_is_refused_by_name_or_read_back(method, name, form, W, H):
    if not held(name, form):
        wanted = rf"layers\.0\.experts\.0\.gate: {form} cannot hold it: .*"
        shown = {"q4_0": "int4 g32", "q8_0": "int8 g32"}.get(name, name)
        with pytest.raises(InputError, match=wanted + ("" if form == "bf16" else shown)):
            planned(name, form, method)
        return
    unit = planned(name, form, method)
    packing = FORMATS[form]
    quantized = rounded(method, W, H, unit.scheme)
    tensor = f"{STEM}.weight"
    packed = packing.pack(tensor, quantized)
    layout = packing.packed_layout(tensor, (ROWS, COLUMNS), unit.scheme)
    assert {key: (part.dtype, tuple(part.shape)) for key, part in packed.items()} == layout
    assert same(packing.unpack(tensor, packed, unit.scheme), quantized)
    assert can_copy(unit.scheme, unit.scheme, COLUMNS)
    assert same(copy_quantized(quantized, unit.scheme), quantized)
    theirs = {key.removeprefix(f"{STEM}."): part for key, part in packed.items()}
    found = READERS[form](theirs, replace(unit, tensor=tensor, shape=(ROWS, COLUMNS)))
    assert torch.equal(found, values(quantized, form))


def same(found: QTensor, wanted: QTensor) -> bool:
    pairs = [(getattr(found, f.name), getattr(wanted, f.name)) for f in fields(QTensor)]
    return all(torch.equal(a, b) if isinstance(b, Tensor) else a == b for a, b in pairs)


def values(quantized: QTensor, form: str) -> Tensor:
    """What the codes stand for, float32 [out, in]. llama.cpp multiplies float16 scales in float32,
    the others in the dtype of the scales."""
    scheme = quantized.scheme
    if form == "gguf" and scheme.scale_dtype == "float16":
        offsets = quantized.offsets
        offsets = None if offsets is None else offsets.float()
        scales = quantized.scales.float()
        quantized = QTensor(quantized.codes, scales, scheme, offsets=offsets)
    return quantized.dequantize().float()


@pytest.mark.parametrize("name", [n for n, grid in GRIDS.items() if n != "integer"])
def test_gptq_errs_less_than_rtn_on_the_outputs(name, W, H):
    scheme = GRIDS[name].scheme
    lost = {}
    for method in ("rtn", "gptq"):
        E = W - rounded(method, W, H, scheme).dequantize().float()
        lost[method] = ((E @ H) * E).sum().item()
    assert lost["gptq"] < 0.9 * lost["rtn"]


@pytest.mark.parametrize("name", ["nf4", "iq4_nl", "iq4_xs", "q3_k", "q2_k"])
def test_the_compiled_loop_of_gptq_agrees_with_the_plain_one(name, W, H, monkeypatch):
    scheme = GRIDS[name].scheme
    compiled = rounded("gptq", W, H, scheme)
    monkeypatch.setattr(gptq, "leaf_of", lambda device: PlainLeaf)
    plain = rounded("gptq", W, H, scheme)
    assert (compiled.codes == plain.codes).float().mean() > 0.99  # all but ties and what follows


@pytest.mark.parametrize(
    ("grid", "key", "complaint"),
    [
        ("q4_k", {"group": 64}, "fixed by grid q4_k"),
        ("iq4_nl", {"group": 64}, "fixed by grid iq4_nl"),
        ("q3_k", {"bits": 3}, "fixed by grid q3_k"),
        ("nf4", {"group": "channel"}, "grid nf4 has groups of 32, 64, 128, .*, 4096, not channel"),
        ("iq4", {}, "expected integer, nf4, .*iq4_nl"),
    ],
)
def test_the_recipe_refuses_what_a_grid_has_not(grid, key, complaint):
    rule = {"match": "*", "method": "rtn", "grid": grid} | key
    values = {"model": {"path": "toy"}, "quantize": [rule], "output": {"path": "out"}}
    with pytest.raises(InputError, match=complaint):
        parse_recipe(values)


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_a_row_agrees_with_the_gguf_package(name):
    grid, kind = GRIDS[name], GGMLQuantizationType[name.upper()]
    sizes = (grid.block_columns, grid.block_bytes)
    assert GGML_QUANT_SIZES[kind] == sizes
    assert TYPES[name.upper()] == (int(kind), *sizes)
    assert grid.formats[-1] == "gguf"
    bits = stored_bits(grid.scheme, (8, 4 * grid.block_columns))
    assert bits == 8 * 4 * grid.block_bytes * 8
    if grid.table:
        assert grid.table == quants.IQ4_NL.kvalues


@pytest.mark.parametrize("name", GRIDS)
def test_a_row_is_consistent(name):
    grid = GRIDS[name]
    assert grid.name == name and set(grid.formats) <= FORMATS.keys()
    assert grid.finder in FINDERS and len(set(grid.groups)) == len(grid.groups)
    assert grid.scheme.row in (grid, GRIDS["integer"])
    if grid.table:
        assert grid.unsigned and len(set(grid.table)) > 1 << (grid.bits - 1)
        assert len(grid.table) == 1 << grid.bits
    if not grid.is_integer:
        assert str(grid.scheme).startswith(f"{name} ")


def naive_scales(W: Tensor, name: str) -> Iterator[tuple[Tensor, float, float]]:
    """(weights, scale, offset) of each group, found without any search: whole ranges, then stored
    as whole numbers of the steps of a block."""
    grid = GRIDS[name]
    most = (1 << (grid.scale_bits - (1 if grid.symmetric else 0))) - 1
    limit = max(map(abs, grid.table)) if grid.table else 2 ** (grid.bits - 1) - 1
    for row in W:
        for block in row.split(grid.block_columns):
            groups = block.split(grid.group_size)
            if grid.symmetric:
                scales = [group.abs().max().item() / limit for group in groups]
                lows = [0.0] * len(groups)
            else:
                lows = [min(group.min().item(), 0.0) for group in groups]
                spans = [
                    max(group.max().item(), 0.0) - lo
                    for group, lo in zip(groups, lows, strict=True)
                ]
                scales = [span / (2**grid.bits - 1) for span in spans]
            if grid.has_header:
                d, dmin = (half(max(map(abs, x)) / most) or 1.0 for x in (scales, lows))
                scales = [d * min(round(scale / d), most) for scale in scales]
                lows = [dmin * max(round(low / dmin), -most) for low in lows]
            for group, scale, low in zip(groups, scales, lows, strict=True):
                yield group, half(scale) if not grid.has_header else scale, low


def half(value: float) -> float:
    return torch.tensor(value).half().item()


def naive_error(W: Tensor, importance: Tensor, name: str) -> float:
    """Weighted squared error of rounding to `naive_scales`, each weight to its nearest value."""
    grid = GRIDS[name]
    entries = torch.tensor(grid.table or range(grid.scheme.qmin, grid.scheme.qmax + 1))
    lost = 0.0
    for index, (group, scale, low) in enumerate(naive_scales(W, name)):
        levels = entries * scale + low
        nearest = (group.unsqueeze(1) - levels).abs().amin(1)
        first = index * grid.group_size % W.shape[1]
        lost += (nearest.square() * importance[first : first + grid.group_size]).sum().item()
    return lost


DRAWS = torch.Generator().manual_seed(7)
# Kinds of weights [8, 512], some of which already lie on a grid or on one side of 0.
KINDS_OF_WEIGHTS = {
    "normal": torch.randn(8, 512, generator=DRAWS),
    "heavy tails": torch.randn(8, 512, generator=DRAWS) ** 3,
    "one side": -torch.rand(8, 512, generator=DRAWS),
    "far from 0": torch.randn(8, 512, generator=DRAWS) / 10 + 1,
    "sparse": torch.randn(8, 512, generator=DRAWS) * (torch.rand(8, 512, generator=DRAWS) < 0.05),
    "16 values": torch.randint(-8, 8, (8, 512), generator=DRAWS).float(),
}
SEARCHED = [
    *(Scheme(bits, group, even) for bits in (2, 3, 4, 5, 6, 8) for group in (32, None)
      for even in (True, False)),
    *(GRIDS[name].scheme for name in ("nf4", "fp4", "llm_int8", "q4_1", "q8_0", "q4_0")),
]  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS_OF_WEIGHTS)
@pytest.mark.parametrize("scheme", SEARCHED, ids=str)
def test_the_search_is_never_worse_than_whole_ranges(scheme, kind, weighted):
    """In what engines compute, which is the product of code and scale in the scale's dtype."""
    W = KINDS_OF_WEIGHTS[kind] * 0.0123
    generator = torch.Generator().manual_seed(3)
    importance = torch.rand(512, generator=generator) ** 3 if weighted else torch.ones(512)
    lost = []
    for rule in ("mse", "absmax"):
        error = find_levels(W, scheme, rule, importance).nearest(W).dequantize().double() - W
        lost.append((error.square() * importance).sum(1))
    # Floats of the search are added in another order.
    assert (lost[0] <= lost[1] * (1 + 1e-5)).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["iq4_nl", "iq4_xs", "q3_k", "q2_k", "q4_k", "q6_k"])
def test_the_search_beats_whole_ranges(name, weighted, W):
    generator = torch.Generator().manual_seed(2)
    importance = torch.rand(COLUMNS, generator=generator) ** 3 if weighted else torch.ones(COLUMNS)
    W = W[:8] * torch.logspace(-2, 1, 8).unsqueeze(1)
    scheme = GRIDS[name].scheme
    found = find_levels(W, scheme, "mse", importance).nearest(W).dequantize()
    for row in range(len(W)):
        lost = ((found[row] - W[row]).square() * importance).sum().item()
        assert lost < 0.85 * naive_error(W[row : row + 1], importance, name)


@pytest.mark.parametrize("name", ["iq4_nl", "iq4_xs", "q3_k", "q2_k"])
def test_importance_decides_the_search(name, W):
    """What is important errs less than in a search that does not know it."""
    importance = torch.full((COLUMNS,), 0.01)
    importance[::7] = 1
    scheme = GRIDS[name].scheme
    lost = []
    for given in (None, importance):
        error = find_levels(W, scheme, "mse", given).nearest(W).dequantize() - W
        lost.append((error.square() * importance).sum().item())
    assert lost[1] < 0.8 * lost[0]


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_rows_say_where_blocks_hold_float16(name):
    """Only there can a block hold what is not finite; any other byte may have any value."""
    grid = GRIDS[name]
    size = grid.block_bytes
    blocks = torch.arange(4 * size, dtype=torch.int32).mul(73).to(torch.uint8).view(4, size)
    for byte in grid.float16_at:
        blocks[:, byte : byte + 2] = torch.ones(1, dtype=torch.float16).view(torch.uint8)
    kind = GGMLQuantizationType[name.upper()]
    assert torch.from_numpy(quants.dequantize(blocks.numpy(), kind)).isfinite().all()
    assert grid.float16_at
    for byte in grid.float16_at:
        damaged = blocks.clone()
        damaged[0, byte : byte + 2] = NAN.view(torch.uint8)
        values = torch.from_numpy(quants.dequantize(damaged.numpy(), kind))
        assert not values[0].isfinite().all() and values[1:].isfinite().all()
