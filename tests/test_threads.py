"""Calibration gives the same bytes on any number of threads: no library splits a sum."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ATTENTION, EXPERTS, saved_model
from make_release import write_random_release
from torch.utils._python_dispatch import TorchDispatchMode

from grokquant.job import pipeline
from grokquant.recipe import Recipe
from grokquant.threads import Workers, alone, in_pieces, slices
from grokquant.toy import TOY_PATH

# Operations that compute each of their results from one element of each operand, with one rounding,
# or from none: threads that share them change no bit. All others belong in a piece.
EXACT = """
    _to_copy _unsafe_view abs add add_ alias all aminmax bucketize clone copy_ detach diagonal
    div div_ eq equal flip gather index lift_fresh mul mul_ ne new_empty new_zeros permute
    select slice split split_with_sizes stack sub sub_ transpose tril tril_ triu triu_ unsqueeze
    unbind view zeros_like
"""
RULES = {
    "gptq": {"method": "gptq"},
    "two-sided": {"method": "two-sided"},
    "two-sided by gradients": {"method": "two-sided", "metric": "gradients", "descent": True},
}
# Parameters of a new model, drawn before its own are read.
DRAWN = {"normal_", "uniform_"}
# Elements below which torch keeps an operation on one thread: at::internal::GRAIN_SIZE is 32768,
# the largest tensors of these models are larger, those of their positions smaller.
FEW = 1 << 12


@pytest.fixture(autouse=True)
def own_number() -> Iterator[None]:
    """Each test may set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def grok(tmp_path_factory) -> Path:
    """Wide enough that MKL and oneDNN share its products among threads."""
    path = tmp_path_factory.mktemp("wide")
    sizes = {"hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 64}
    write_random_release(path, layers=1, vocab=2048, **sizes)
    shutil.copyfile(TOY_PATH / "tokenizer.model", path / "tokenizer.model")
    return path


@pytest.fixture(scope="module")
def qwen2_moe(tmp_path_factory) -> Path:
    """A model of transformers: fused attention, a shared expert."""
    path = tmp_path_factory.mktemp("qwen")
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    }
    return saved_model(path, "qwen2_moe", **sizes)


@pytest.fixture(
    params=[
        ("grok", "gptq"),
        ("qwen2_moe", "gptq"),
        ("grok", "two-sided by gradients"),
        ("qwen2_moe", "two-sided"),
    ],
    ids=" ".join,
)
def recipe(request, tiny_recipe) -> Recipe:
    attention = ATTENTION | {"method": "gptq", "bits": 8, "group": 32}
    family, method = request.param
    source = request.getfixturevalue(family)
    experts = EXPERTS | RULES[method]
    return tiny_recipe(experts, attention, model={"path": str(source)})


def test_any_number_of_threads_gives_the_same_bytes(recipe, request):
    sums = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output = pipeline.quantize(recipe)
        sums.append((output / "SHA256SUMS").read_text())  # the report among them
        shutil.rmtree(output)
    assert sums[1] == sums[0] and sums[2] == sums[0]


class Watch(TorchDispatchMode):
    """Notes the operations of the thread that enters it on more than FEW elements."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if max((tensor.numel() for tensor in tensors), default=0) > FEW:
            self.seen.add(func.name().removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))


def test_threads_share_no_operation_whose_result_depends_on_their_number(recipe):
    torch.set_num_threads(2)
    with Watch() as watch:
        pipeline.quantize(recipe)
    assert watch.seen - set(EXACT.split()) - DRAWN == set()
    assert "mul" in watch.seen  # it watches


def test_results_come_in_order_of_the_pieces():
    torch.set_num_threads(3)
    assert in_pieces(lambda part: part.stop, slices(2, 11, 4)) == [6, 10, 11]
    assert in_pieces(lambda piece: piece, []) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_a_piece_has_one_thread_and_the_modes_of_its_maker(threads):
    def look(_: object) -> tuple[int, bool, int]:
        within = in_pieces(lambda _: threading.get_ident(), range(3))
        return torch.get_num_threads(), torch.is_grad_enabled(), len(set(within))

    torch.set_num_threads(threads)
    with torch.no_grad():
        assert in_pieces(look, range(4)) == [(1, False, 1)] * 4
    assert alone(lambda: look(None)) == (1, True, 1)
    assert torch.get_num_threads() == threads
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [threads]


def test_an_error_ends_the_work_and_restores_the_number():
    done: list[int] = []

    def work(piece: int) -> None:
        if piece == 0:
            raise ValueError("a piece")
        done.append(piece)

    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="a piece"):
        in_pieces(work, range(100))
    assert torch.get_num_threads() == 2


def test_another_device_has_no_threads():
    torch.set_num_threads(3)
    here = threading.get_ident()
    device = torch.device("meta")
    assert in_pieces(lambda _: threading.get_ident(), range(3), device) == [here] * 3


def test_threads_are_made_once():
    """A new thread that finds no memory would be waited for without end."""
    torch.set_num_threads(2)

    def names(_: object) -> str:
        return threading.current_thread().name

    first = set(in_pieces(names, range(20)))
    before = threading.active_count()
    assert set(in_pieces(names, range(20))) | first <= {"piece_0", "piece_1"}
    assert threading.active_count() == before


def test_workers_help_work_that_is_alone():
    torch.set_num_threads(2)
    workers = Workers()
    meeting = threading.Barrier(2)

    def helped() -> list[int]:
        return workers.map(lambda _: meeting.wait(60) * 0 + torch.get_num_threads(), range(2))

    assert alone(helped) == [1, 1]
    assert torch.get_num_threads() == 2


def test_a_fork_makes_its_own_threads():
    torch.set_num_threads(2)
    in_pieces(id, range(2))
    child = os.fork()
    if not child:
        os._exit(in_pieces(lambda piece: piece, range(3)) != [0, 1, 2])
    assert os.waitpid(child, 0)[1] == 0
