"""GPTQ on a GPU, which no test has: the kernel in Triton's interpreter, and launches counted."""

import os
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grokquant.grids import GRIDS, Scheme
from grokquant.methods import gptq
from grokquant.methods.gptq import factorize, round_gptq
from grokquant.methods.gptq_leaf import Columns, CompiledLeaf, LaunchedLeaf, Leaf, PlainLeaf
from grokquant.methods.scales import ScaleRule

SCHEMES = [Scheme(4, 32), Scheme(4, 88, False), Scheme(8, None), GRIDS["nf4"].scheme]
META = torch.device("meta")
# What the host reads: all is finite and positive, nothing has failed, the first column is 0.
ANSWERS = {torch.bool: True, torch.float32: 1.0, torch.float64: 1.0, torch.int32: 0, torch.int64: 0}


# --- Launches, counted on the meta device


class Launches(TorchDispatchMode):
    """Counts operations that launch something, and `reads`, for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count["reads"] += 1
            return ANSWERS[args[0].dtype]
        if not func.is_view and "empty" not in str(func):
            self.count["operations"] += 1
        return func(*args, **kwargs or {})


@pytest.fixture
def launches(monkeypatch):
    """Launches of what runs in this block, with the kernel of a leaf as one of them."""
    launched = Launches()

    class StubbedLeaf(LaunchedLeaf):
        def round(self, part: slice) -> None:
            launched.count["leaves"] += 1

    monkeypatch.setattr(gptq, "leaf_of", lambda device: StubbedLeaf)
    return launched


def round_expert(hidden: int, inner: int, rule: ScaleRule) -> None:
    """Rounds gate, up and down of an expert from their Hessians, as a layer does."""
    scheme = Scheme(4, 128)
    for columns, matrices in ((hidden, [(inner, hidden)] * 2), (inner, [(hidden, inner)])):
        H = [torch.empty(columns, columns, device=META)]
        feedback = factorize(H, 0.01, act_order=True)
        for shape in matrices:
            W = torch.empty(shape, dtype=torch.bfloat16, device=META)
            round_gptq(W, feedback, scheme, rule)


def test_a_leaf_is_one_launch_and_a_candidate_of_a_scale_a_few(launches):
    with launches:
        round_expert(256, 512, "mse")
    assert launches.count["leaves"] == 2 * 256 // 64 + 512 // 64
    # Of 42 candidates for each of three matrices.
    assert launches.count["operations"] < 3 * 42 * 25


def test_an_expert_of_grok_1_takes_few_launches(launches):
    with launches:
        round_expert(6144, 32768, "absmax")
    slabs = 2 * 32768 // gptq.SLAB_ROWS, -(-6144 // gptq.SLAB_ROWS)
    # Leaves have 48 of 6144 columns, and 64 of 32768.
    assert launches.count["leaves"] == slabs[0] * 128 + slabs[1] * 512 == 3072
    # A product for nearly each leaf; three factorizations and permutations in panels. In the loop
    # the columns alone would take a dozen each, in all slabs 2 million.
    assert launches.count["operations"] < 3072 + 5000
    assert launches.count["reads"] < 200


# --- `make test-kernels`


def columns_of(scheme: Scheme, exact: bool) -> Columns:
    """Random columns; `exact`: of numbers whose products and sums have no rounding error."""
    generator = torch.Generator().manual_seed(0)
    count, rows, groups = 44, 75, 4  # no multiples of what a program holds

    def random(*shape: int, spread: int) -> Tensor:
        """Quarters if exact, else anything."""
        integers = torch.randint(-spread, spread + 1, shape, generator=generator) / 4
        return integers if exact else torch.randn(shape, generator=generator) * spread / 8

    W = random(count, rows, spread=12)
    zeros = torch.randint(-2, 3, (groups, rows), generator=generator).float()
    zeros *= not (scheme.symmetric or scheme.row.table)
    return Columns(
        errors=W.clone(),
        targets=W,
        codes=torch.zeros(count, rows, dtype=torch.int8),
        F=random(2 * count, 2 * count, spread=1)[:count, :count],  # rows apart, as in a factor
        D=random(count, spread=4).abs() + 1,
        groups=torch.arange(count) * groups // count,
        scales=torch.full((groups, rows), 0.25) if exact else random(groups, rows, spread=1) + 0.3,
        zero_points=zeros,
        offsets=torch.zeros(groups, rows),
        scheme=scheme,
    )


def rounded(leaf: type[Leaf], columns: Columns) -> tuple[Columns, float]:
    own = replace(
        columns,
        errors=columns.errors.clone(),
        targets=columns.targets.clone(),
        codes=columns.codes.clone(),
    )
    rounding = leaf(own)
    rounding.round(slice(0, 20))
    rounding.round(slice(20, 44))
    return own, rounding.loss()


@pytest.fixture
def triton():
    found = pytest.importorskip("triton", reason="triton is not installed; see `make test-kernels`")
    if not (os.environ.get("TRITON_INTERPRET") or torch.cuda.is_available()):
        pytest.skip("there is no GPU, and TRITON_INTERPRET is not set")
    return found


@pytest.mark.kernels
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_all_leaves_give_the_same_integers_where_nothing_is_rounded(triton, scheme):
    columns = columns_of(scheme, exact=not scheme.row.table)
    compiled, loss = rounded(CompiledLeaf, columns)
    for leaf in (PlainLeaf, LaunchedLeaf):
        other, other_loss = rounded(leaf, columns)
        assert torch.equal(other.codes, compiled.codes)
        assert torch.allclose(other.errors, compiled.errors, atol=1e-5)
        assert other_loss == pytest.approx(loss, rel=1e-6)
    assert len(compiled.codes.unique()) > 8


@pytest.mark.kernels
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_matrix_is_rounded_as_on_the_cpu(triton, scheme, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(40, 352, generator=generator)
    if 352 % (scheme.group_size or 1):
        W = W[:, :320]
    X = torch.randn(700, W.shape[1], generator=generator)
    feedback = factorize(X.T @ X, 0.01, act_order=True)
    expected = round_gptq(W, feedback, scheme)
    monkeypatch.setattr(gptq, "leaf_of", lambda device: LaunchedLeaf)
    found = round_gptq(W, feedback, scheme)
    assert (found.quantized.codes != expected.quantized.codes).sum() <= 2  # ties
    assert found.output_error == pytest.approx(expected.output_error, rel=1e-3)


@pytest.mark.kernels
@pytest.mark.parametrize("has_table", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_gpus_that_are_not_here(capability, has_table):
    """To machine code of an A100 and an H100, with exact divisions, all in registers."""
    pytest.importorskip("triton", reason="triton is not installed; see `make test-kernels`")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the interpreter compiles nothing")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from grokquant.methods.gptq_triton import _round_leaf

    kinds = {name: "*fp32" for name in _round_leaf.arg_names}
    kinds |= {"codes": "*i8", "lost": "*fp64", "groups": "*i64", "low": "fp32", "high": "fp32"}
    kinds |= dict.fromkeys(("columns", "rows", "F_stride", "entries"), "i32")
    fixed = {"HAS_TABLE": has_table, "COLUMNS": 64, "ROWS": 32}
    source = ASTSource(_round_leaf, kinds | dict.fromkeys(fixed, "constexpr"), fixed)
    options = {"num_warps": 1, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    assert "div.rn.f32" in ptx and "div.full" not in ptx
    assert ".local" not in ptx
    assert compiled.asm["cubin"]
