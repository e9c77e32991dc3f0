"""What people see who wait: signs of life, and the time that is left."""

import threading

import pytest

from grokquant.cli import main
from grokquant.job import pipeline
from grokquant.job.plan import build_plan
from grokquant.reporting.signs_of_life import VARIABLE, SignsOfLife
from grokquant.reporting.terminal import LayerProgress, RunProgress, seconds_left


def test_a_line_after_each_silence_and_only_then():
    life = SignsOfLife("plan: working", print, every=10)
    begun = life.begun
    assert life.line_due(begun + 9) is None
    assert life.line_due(begun + 10) == "plan: working: 10 s so far"
    assert life.line_due(begun + 19) is None
    life.last = begun + 25  # something else was said
    assert life.line_due(begun + 34) is None
    life.doing = "layer 3"
    assert life.line_due(begun + 75) == "layer 3: 1 min 15 s so far"


def test_lines_come_while_the_command_is_busy():
    said = threading.Event()
    with SignsOfLife("busy", lambda line: said.set(), every=0.01):
        assert said.wait(60)
    assert not any(thread.name == "signs of life" for thread in threading.enumerate())


def test_without_memory_for_a_thread_the_command_runs(monkeypatch):
    def no_thread(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with SignsOfLife("busy", print, every=10):
        pass


def test_every_command_has_them(monkeypatch, tmp_path):
    from click.testing import CliRunner

    monkeypatch.setenv(VARIABLE, "0")
    result = CliRunner().invoke(main, ["inspect", "toy"])
    assert result.exit_code == 0 and "inspect: working: 0 s so far" in result.stderr
    monkeypatch.setenv(VARIABLE, "soon")
    result = CliRunner().invoke(main, ["inspect", "toy"])
    assert result.stderr == "grokquant: GROKQUANT_SILENCE: expected seconds, not 'soon'\n"


def test_a_run_says_which_matrix_it_is_at(tiny_recipe):
    life = SignsOfLife("quantize", print, every=10)
    doing: list[str] = []

    class Watched(RunProgress):
        def unit_done(self, name: str) -> None:
            super().unit_done(name)
            doing.append(life.doing)

    with Watched(life=life) as progress:
        pipeline.quantize(tiny_recipe(), progress)
    units = len(build_plan(tiny_recipe()).units_of(0))
    wanted = [f"layer {i} of 2, {n + 1} of {units} matrices" for i in (0, 1) for n in range(units)]
    assert doing == [f"quantizing {line}" for line in wanted]
    assert life.doing == "writing and verifying"


@pytest.mark.parametrize(
    ("ends", "layers", "left"),
    [
        ([0, 30], 3, 90),
        ([0, 30, 40], 2, 20),  # the first layer loads and compiles
        ([0, 30, 40, 52], 10, 110),
        ([0, 30, 40], 0, 0),
    ],
)
def test_the_time_left_is_that_of_the_later_layers(ends, layers, left):
    assert seconds_left(ends, layers) == left


def test_an_evaluation_does_not_begin_with_0_s_left(monkeypatch, capsys):
    """The first layer has a time of its own, which began before its line."""
    now = [100.0]
    monkeypatch.setattr("grokquant.reporting.terminal.time.monotonic", lambda: now[0])
    progress = LayerProgress()
    for layer, left in enumerate(("40 s", "10 s", "0 s")):
        now[0] += 20 if layer == 0 else 10
        progress.layer_done(_Layer(layer), 3)
        assert capsys.readouterr().err.endswith(f", {left} left\n")


def test_a_resumed_run_counts_the_layers_that_are_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("grokquant.reporting.terminal.time.monotonic", lambda: now[0])
    progress = RunProgress()
    progress.begin("quantizing", 10)
    now[0] = 8.0
    progress.advance("layer 7: ", 7)
    assert capsys.readouterr().err.endswith(", 16 s left\n")


class _Layer:
    """What a line needs of the figures of a layer."""

    router_set = None
    relative_error = 0.5

    def __init__(self, layer: int) -> None:
        self.layer = layer
