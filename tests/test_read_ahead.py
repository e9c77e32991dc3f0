"""The next matrix is read while this one is rounded, each once."""

import threading

import pytest
import torch

from grokquant.errors import InputError
from grokquant.job import pipeline
from grokquant.job.layer import LayerQuantizer
from grokquant.job.plan import build_plan
from grokquant.job.read_ahead import ReadAhead
from grokquant.job.workdir import States
from grokquant.streaming.blocks import CALIBRATION_DTYPE
from grokquant.streaming.whole import running
from grokquant.types import TensorRef


def test_the_next_tensor_is_read_before_it_is_asked_for():
    read: list[tuple[str, bool]] = []
    began = {name: threading.Event() for name in "abcd"}

    def ref(name: str) -> TensorRef:
        def load() -> torch.Tensor:
            read.append((name, threading.current_thread() is threading.main_thread()))
            began[name].set()
            return torch.full((1, 1), float(ord(name)))

        return TensorRef(name, (1, 1), torch.float32, 4, load)

    refs = {name: ref(name) for name in "abcd"}
    ahead = ReadAhead(list(refs.values()))
    assert ahead.of(refs["a"]).read().item() == ord("a")
    assert began["b"].wait(60)
    assert ahead.of(refs["b"]).read().item() == ord("b")
    assert began["c"].wait(60)
    assert ahead.of(refs["d"]).read().item() == ord("d")  # c is not needed after all
    ahead.close()
    assert read == [("a", True), ("b", False), ("c", False), ("d", True)]


def test_reading_ends_with_a_layer_that_fails(tiny_recipe, monkeypatch):
    closed: list[ReadAhead] = []
    monkeypatch.setattr(ReadAhead, "close", lambda ahead: closed.append(ahead))
    plan = build_plan(tiny_recipe())
    model = running(plan.checkpoint, CALIBRATION_DTYPE)

    def fail(*_: object) -> None:
        raise InputError("no space left")

    layer = LayerQuantizer(plan, model, 0, fail, lambda _: None)
    with pytest.raises(InputError, match="no space left"):
        layer.run(States(model.embed(torch.arange(64).view(2, 32))))
    assert closed == [layer._reading]


def test_experts_are_read_ahead_in_a_run(tiny_recipe, monkeypatch):
    readers: list[str] = []
    load = ReadAhead._load

    def noted(ahead: ReadAhead, ref: TensorRef) -> object:
        waiting = ahead._waiting
        readers.append("ahead" if waiting and waiting[0] == ref.name else "now")
        return load(ahead, ref)

    monkeypatch.setattr(ReadAhead, "_load", noted)
    pipeline.quantize(tiny_recipe())
    matrices = 2 * 4 * 3  # of layers, experts and their parts
    # Of experts the first matrix of each layer is not expected.
    assert readers.count("ahead") == matrices - 2
