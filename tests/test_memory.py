"""Memory that runs out: one line that names the step and what to lower, and the run goes on."""

import errno
import mmap
from collections.abc import Callable

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import grokquant
from grokquant import errors
from grokquant.cli import main
from grokquant.job.verify import verify
from grokquant.memory import memory_for
from grokquant.methods.gptq import Gptq

TOO_MUCH = 1 << 55  # bytes, more than any process can address


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


EXHAUSTED = {
    "python": raising(MemoryError()),
    "numpy": lambda: np.empty(TOO_MUCH, np.uint8),
    "torch": lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
    "mmap": lambda: mmap.mmap(-1, TOO_MUCH),
    "cuda": raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0")),
    "cublas": raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x")),
    "onednn": raising(RuntimeError("could not create a memory object")),
    "thread": raising(RuntimeError("can't start new thread")),
    "file": raising(OSError(errno.ENOMEM, "Cannot allocate memory", "model.safetensors")),
    "library": raising(ImportError("libx.so: failed to map segment from shared object")),
}
OTHERS = [
    ValueError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.ENOSPC, "No space left on device"),
    errors.InputError("notes.txt: out of memory is not a recipe"),
]


@pytest.mark.parametrize("fail", EXHAUSTED.values(), ids=EXHAUSTED)
def test_every_library_is_understood(fail):
    with (
        pytest.raises(errors.OutOfMemory) as raised,
        memory_for("layer 3"),
        memory_for("layers.3.attention.q: gptq"),
    ):
        fail()
    text = str(raised.value)
    assert text.startswith("layers.3.attention.q: gptq: out of memory (") and "\n" not in text
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as raised, memory_for("layer 3"):
        raise error
    assert raised.value is error


def test_the_memory_of_a_failed_step_is_freed():
    freed: list[bool] = []

    class Held:
        def __del__(self) -> None:
            freed.append(True)

    def fail() -> None:
        held = Held()
        raise MemoryError(repr(held))

    with pytest.raises(errors.OutOfMemory) as raised, memory_for("layer 3"):
        fail()
    assert freed and raised.value


@pytest.mark.parametrize("fail", [EXHAUSTED["torch"], EXHAUSTED["numpy"]], ids=["torch", "numpy"])
def test_a_run_names_the_matrix_and_goes_on(fail, tiny_recipe, monkeypatch):
    recipe = tiny_recipe()
    rounds = Gptq.round
    calls: list[object] = []

    def third_fails(*arguments):
        calls.append(arguments)
        return fail() if len(calls) == 3 else rounds(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Gptq, "round", third_fails)
        with pytest.raises(errors.OutOfMemory) as raised:
            grokquant.quantize(recipe)
    first, done, ways = str(raised.value).split("; ")
    assert first.startswith("layers.0.experts.0.down: gptq: out of memory (")
    assert done.endswith(" of 3 files are done")
    assert ways == (
        "run the same command with more memory or fewer threads (OMP_NUM_THREADS), or lower "
        "calibration.samples and begin anew"
    )
    assert verify(grokquant.quantize(recipe))


@pytest.mark.parametrize(
    ("function", "command", "hint"),
    [
        ("job.verify.verify", "verify out", ""),
        ("job.plan.build_plan", "plan recipes/toy-int8.yaml", ""),
        ("runtime.generate.generate_text", "generate toy --prompt x", "; set --max-memory"),
        (
            "evaluation.run.run_suite",
            "eval toy --reference toy --output reports",
            "; lower --samples or --length",
        ),
    ],
)
def test_every_command_ends_with_one_line(function, command, hint, monkeypatch):
    monkeypatch.setattr(f"grokquant.{function}", lambda *_, **__: EXHAUSTED["numpy"]())
    result = CliRunner().invoke(main, command.split())
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"grokquant: {command.split()[0]}: out of memory (Unable to allocate 32")
    assert line.endswith(f"){hint}")
