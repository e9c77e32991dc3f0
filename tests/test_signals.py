"""Signals during `grokquant.quantize`, called from Python."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import grokquant
from grokquant.errors import Stopped
from grokquant.job.pipeline import Silence
from grokquant.job.verify import verify
from grokquant.job.workdir import WorkDirectory

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, Callable]]:
    """Handlers of the user's own, which must be in place again after each run."""
    own = {number: lambda *_: None for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield own
    found = {number: signal.getsignal(number) for number in own}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert found == own


def interrupt(monkeypatch, owner: type, name: str, number: int) -> None:
    """Sends a signal before the method `name` of `owner` does its work."""
    method = getattr(owner, name)

    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        return method(*arguments)

    monkeypatch.setattr(owner, name, interrupted)


def quantize_forgivingly(recipe) -> Path | None:
    """What scripts do that quantize many models."""
    try:
        return grokquant.quantize(recipe)
    except Exception:
        return None


@BOTH
def test_no_handler_of_exceptions_swallows_a_signal(number, tiny_recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, Silence, "layer_done", number)
        with pytest.raises(KeyboardInterrupt, match="stopped, 2 of 3 files are done") as stopped:
            quantize_forgivingly(tiny_recipe())
    assert isinstance(stopped.value, Stopped)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert verify(grokquant.quantize(tiny_recipe()))


@BOTH
def test_a_signal_when_nothing_is_left_to_stop_is_not_lost(number, tiny_recipe, monkeypatch):
    recipe = tiny_recipe({"match": "layers.*", "method": "copy"})
    interrupt(monkeypatch, WorkDirectory, "publish", number)
    with pytest.raises(KeyboardInterrupt, match="out: is finished"):
        quantize_forgivingly(recipe)
    assert verify(Path(recipe.output.path))


@BOTH
def test_ignored_signals_stay_ignored(number, tiny_recipe, handlers, monkeypatch):
    handlers[number] = signal.SIG_IGN  # also what must be there afterwards
    signal.signal(number, signal.SIG_IGN)
    interrupt(monkeypatch, Silence, "layer_done", number)
    assert quantize_forgivingly(tiny_recipe({"match": "layers.*", "method": "copy"}))


def test_another_thread_leaves_signals_alone(tiny_recipe, handlers, monkeypatch):
    seen: list[object] = []
    monkeypatch.setattr(
        Silence, "layer_done", lambda *_: seen.append(signal.getsignal(signal.SIGTERM))
    )
    recipe = tiny_recipe({"match": "layers.*", "method": "copy"})
    thread = threading.Thread(target=grokquant.quantize, args=(recipe,))
    thread.start()
    thread.join()
    assert verify(Path(recipe.output.path))
    assert seen == [handlers[signal.SIGTERM]] * 2


@BOTH
def test_an_interruption_after_the_last_line_prints_nothing(number):
    code = (
        "import atexit, os, sys\n"
        "from grokquant.cli import main\n"
        f"atexit.register(os.kill, os.getpid(), {int(number)})\n"
        "main(['plan', '-h'])\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert (finished.returncode, finished.stderr) == (-number, b"")
