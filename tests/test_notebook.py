"""The notebook runs from either place where people start it, and is stored without output."""

import shutil
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

import grokquant
from grokquant.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quantized-toy.ipynb"


@pytest.fixture
def this_python(tmp_path, monkeypatch):
    """Makes "python3" the interpreter that runs the tests, whatever kernels are installed."""
    write_kernel_spec(str(tmp_path / "kernels" / "python3"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def clone(tmp_path):
    """The files that a run needs, in a directory that has seen no run."""
    shutil.copytree(ROOT / "recipes", tmp_path / "clone" / "recipes")
    (tmp_path / "clone" / "notebooks").mkdir()
    return tmp_path / "clone"


def executed(directory: Path) -> list[dict]:
    """Runs the notebook in `directory` and returns all outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(directory)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def words(outputs: list[dict]) -> str:
    """All text that a reader sees."""
    printed = [output["text"] for output in outputs if output.get("name") == "stdout"]
    return "\n".join(printed + [o["data"]["text/markdown"] for o in outputs if is_text(o)])


def is_text(output: dict) -> bool:
    return "text/markdown" in output.get("data", {})


def test_it_runs_without_an_earlier_result(this_python, clone):
    outputs = executed(clone / "notebooks")
    assert [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"] == []
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) == 3
    text = words(outputs)
    for part in ("112 matrices", "| Mean KLD |", "bits per weight: ", "4,080 tokens"):
        assert text.count(part) == 1, part
    assert text.count("Return the") >= 2  # both models go on from the same words
    assert sorted(path.name for path in clone.iterdir()) == ["notebooks", "recipes"]


def test_it_takes_an_earlier_result_from_the_root(this_python, clone):
    rule = {"match": "layers.*.experts.*", "method": "rtn", "bits": 8, "group": "channel"}
    output = {"path": str(clone / "runs" / "toy-int4")}
    grokquant.quantize({"model": {"path": "toy"}, "quantize": [rule], "output": output})
    bits = open_checkpoint(output["path"]).bits_per_weight
    assert f"{bits:.2f} bits per weight: " in words(executed(clone))


def test_it_is_stored_without_output():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.metadata == {}, cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
