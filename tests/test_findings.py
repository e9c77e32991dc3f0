"""Matrices of which too much was lost are named at the end of a run, wherever one looks."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from test_families import saved  # noqa: F401

from grokquant import recipe_for
from grokquant.grids import Scheme
from grokquant.job import pipeline
from grokquant.job.card import model_card
from grokquant.job.findings import findings, listed
from grokquant.job.metadata import Record, report_of_plan
from grokquant.job.plan import build_plan
from grokquant.recipe import parse_recipe
from grokquant.reporting.terminal import RunProgress
from grokquant.types import UnitReport

INT4 = Scheme(4, 128)


def report(name: str, error: float, scheme: Scheme = INT4, lost: int = 0) -> UnitReport:
    return UnitReport(name, "rtn", scheme, 4.125, error, 0.0, lost_rows=lost)


def found(*reports: UnitReport) -> list[str]:
    kinds = {each.name: f"{each.name.rstrip('0123456789')} in {each.scheme}" for each in reports}
    return findings(reports, kinds)


def test_twice_the_error_of_its_kind_is_named():
    usual = [report(f"down{i}", 0.1 + i / 1000) for i in range(9)]
    others = [report(f"gate{i}", 0.3) for i in range(9)]
    assert found(*usual, *others, report("down9", 0.2)) == []
    (line,) = found(*usual, *others, report("down9", 0.25))
    assert line == (
        "down9: relative error 0.25, 2.4 times the median 0.105 of down in int4 g128 sym"
    )


def test_a_matrix_is_compared_with_those_on_its_grid():
    int8 = Scheme(8, 128)
    eight = [report(f"down{i}", 0.005, int8) for i in range(9)]
    assert found(*eight, *(report(f"down{i}", 0.1) for i in range(9, 12))) == []


@pytest.mark.parametrize("error", [0.0, 0.2])
def test_few_or_lossless_matrices_have_no_usual_error(error):
    assert found(report("down0", 0.01), report("down1", error)) == []
    assert found(*(report(f"down{i}", 0.0) for i in range(5))) == []


def test_a_matrix_of_which_nothing_is_left_has_one_line():
    usual = [report(f"down{i}", 0.1) for i in range(5)]
    (line,) = found(*usual, report("down9", 1.0000002, lost=64))
    assert line == (
        "down9: 64 rows became zero, too small for the grid's scales; "
        "relative error 1, nothing is left of its weights"
    )


@pytest.mark.parametrize(
    ("grid", "instead"), [("q4_k", "IQ4_NL"), ("q5_k", "Q8_0"), ("q6_k", "Q8_0"), ("q8_0", None)]
)
def test_a_type_in_place_of_another_is_named_everywhere(saved, tmp_path, grid, instead):  # noqa: F811
    """All experts have 64 or 96 input features: no matrix is of the type that names the result."""
    recipe = recipe_for(saved("mixtral")[1], grid=grid, output=tmp_path / f"mixtral-{grid}")
    plan = build_plan(recipe)
    lines = [line for line in plan.notes if "K types" in line]
    assert len(lines) == (2 if instead else 0)
    assert all(line.endswith(f"do not divide: {instead}") for line in lines)
    report = report_of_plan(plan, Record([], [], (), {}))
    assert report["findings"] == lines
    assert "\n".join(f"* {line}" for line in lines) in model_card(plan, [])


def test_a_long_list_ends_with_a_number():
    lines = [f"line {i}" for i in range(12)]
    assert listed(lines[:10]) == lines[:10]
    assert listed(lines)[10:] == ["and 2 more, see findings in quantization-report.json"]


@pytest.mark.parametrize("output_format", ["compressed-tensors", "gguf"])
def test_rows_too_small_for_float16_are_named_everywhere(saved, tmp_path, output_format):  # noqa: F811
    """An expert that was never trained, and two rows of another."""
    source = shutil.copytree(saved("mixtral")[1], tmp_path / "source")
    tensors = {name: value.clone() for name, value in load_file(source / FILE).items()}
    tensors[EXPERT.format(1)].mul_(1e-7)
    tensors[EXPERT.format(2)][:2] = 1e-9
    save_file(tensors, source / FILE, metadata={"format": "pt"})
    grid = {"bits": 4, "group": 32, "scale_dtype": "float16"}
    if output_format == "gguf":
        grid = {"grid": "q4_0"}
    recipe = {
        "model": {"path": str(source)},
        "quantize": [{"match": "layers.*.experts.*", "method": "rtn"} | grid],
        "output": {"path": str(tmp_path / "out"), "format": output_format},
    }
    with RunProgress() as progress:
        output = pipeline.quantize(parse_recipe(recipe), progress)
    written = json.loads((output / "quantization-report.json").read_text())
    first, second = written["findings"]
    assert first.startswith("layers.0.experts.1.gate: 96 rows became zero, too small for ")
    assert first.endswith("; relative error 1, nothing is left of its weights")
    assert second.startswith("layers.0.experts.2.gate: 2 rows became zero")
    rows = {row["name"]: row["lost_rows"] for row in written["units"] if row["lost_rows"]}
    assert rows == {"layers.0.experts.1.gate": 96, "layers.0.experts.2.gate": 2}
    assert progress.as_dict(output)["findings"] == [first, second]
    assert f"{first}\n{second}" in "\n".join(progress.summary(output))
    card = (output / "README.md").read_text()
    assert f"* {first}\n* {second}\n" in card


FILE = "model.safetensors"
EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
