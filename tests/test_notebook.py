"""The notebooks run anywhere, show what they are about, and are stored without outputs."""

from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client import KernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An empty directory, as far from the clone as from an earlier result."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def executed(place, tmp_path_factory) -> dict[str, list[dict]]:
    """The outputs of each notebook.

    One kernel runs them all, since it takes most of the time to start one and read the text; each
    begins without names of the one before it.
    """
    home = tmp_path_factory.mktemp("jupyter")
    write_kernel_spec(str(home / "kernels" / "python3"))  # the interpreter that runs the tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(home))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(home / "runtime"))
        patch.setenv("IPYTHONDIR", str(home / "ipython"))
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(cwd=str(place))
        try:
            return {path.stem: _outputs(path, manager) for path in NOTEBOOKS}
        finally:
            manager.shutdown_kernel(now=True)


def _outputs(path: Path, manager: KernelManager) -> list[dict]:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    NotebookClient(notebook, km=manager, timeout=300).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def text_of(outputs: list[dict]) -> str:
    """All that cells print or show."""
    printed = [output.get("text", "") for output in outputs]
    return "\n".join(printed + [output.get("data", {}).get("text/html", "") for output in outputs])


def test_each_runs_without_errors_and_warnings(executed, place):
    assert list(executed) == [
        "01_quantize_and_compare", "02_inspect_experts", "03_generate", "04_budget"
    ]  # fmt: skip
    for name, outputs in executed.items():
        assert [o for o in outputs if o.get("name") == "stderr"] == [], name
    assert [path.name for path in place.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("name", "charts", "parts"),
    [
        (
            "01_quantize_and_compare",
            4,  # and two marks in the table of models
            ["experts.down", "on this machine", "Output error", "Mean KLD", "Pareto front"],
        ),
        ("02_inspect_experts", 8, ["Bits of each expert", "4.125", "Share of the damage"]),
        ("03_generate", 0, ["Return the", "int4", "tokens are the same)", "█"]),
        ("04_budget", 7, ["int4-first-int8", "KL divergence against size", " bits, "]),
    ],
)
def test_each_shows_what_it_is_about(executed, name, charts, parts):
    text = text_of(executed[name])
    assert text.count("<svg") >= charts
    assert [part for part in parts if part not in text] == []


def test_progress_is_one_bar_that_ends_full(executed):
    bars = [
        html
        for output in executed["01_quantize_and_compare"]
        if "<progress" in (html := output.get("data", {}).get("text/html", ""))
    ]
    assert ["4 layers in " in bar and 'max="4" value="4"' in bar for bar in bars] == [True] * 4
    (again,) = [o for o in executed["03_generate"] if "<progress" in str(o)]
    assert "was finished already" in again["data"]["text/html"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_is_stored_without_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.metadata == {}, cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
