"""A damaged result gets the files back that it lost, byte for byte, and keeps everything else."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import stamp, tree

from grokquant.errors import GateError, InputError
from grokquant.job import pipeline
from grokquant.job.seal import seal_evaluation
from grokquant.job.verify import FaultsFound, verify

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def whole(tiny_release, text_file, tmp_path_factory) -> Path:
    """A finished result by gptq, evaluated."""
    from conftest import ATTENTION, EXPERTS

    from grokquant.recipe import parse_recipe

    output = tmp_path_factory.mktemp("whole") / "out"
    values = {
        "model": {"path": str(tiny_release)},
        "calibration": {"text": str(text_file), "samples": 16, "length": 64},
        "quantize": [EXPERTS, ATTENTION],
        "output": {"path": str(output)},
        "eval": {"text": os.path.relpath(text_file), "samples": 4, "length": 64},
    }
    return pipeline.quantize(parse_recipe(values))


@pytest.fixture
def damaged(whole, tiny_recipe, tmp_path) -> Callable:
    """A copy of the result with something done to it, beside a note of the user."""

    def damage(change: Callable[[Path], object]) -> Path:
        output = shutil.copytree(whole, tmp_path / "out")
        change(output)
        return output

    return damage


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Told(pipeline.Silence):
    """What a repair tells: the files it made, and how many were there."""

    def __init__(self) -> None:
        self.names: list[str] | None = None
        self.layers: list[int] = []

    def repaired(self, plan, names) -> None:
        self.names = names

    def layer_done(self, index, reports, tokens) -> None:
        self.layers.append(index)


DAMAGES = {
    "flipped": (lambda out: flip(out / SHARD), [SHARD]),
    "lost": (lambda out: (out / SHARD).unlink(), [SHARD]),
    "shortened": (lambda out: os.truncate(out / SHARD, 100), [SHARD]),
    "config": (lambda out: edit_json(out / "config.json", vocab_size=7), ["config.json"]),
    "tokenizer": (lambda out: (out / "tokenizer.model").unlink(), ["tokenizer.model"]),
    "recipe": (lambda out: (out / "recipe.yaml").write_text("["), ["recipe.yaml"]),
    "sums": (lambda out: (out / "SHA256SUMS").write_text(""), ["SHA256SUMS"]),
    "report": (
        lambda out: (out / "quantization-report.json").unlink(),
        ["quantization-report.json"],
    ),
    "much": (
        lambda out: [p.unlink() for p in (out / SHARD, out / "config.json", out / "README.md")],
        [SHARD, "config.json", "README.md"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_only_what_is_damaged_is_made_again(damaged, whole, tiny_recipe, damage):
    change, names = DAMAGES[damage]
    output = damaged(change)
    before = {path.name: stamp(path) for path in output.iterdir()}
    told = Told()
    assert pipeline.repair(tiny_recipe(), told) == output
    assert set(told.names) == set(names)
    assert tree(output) == tree(whole)
    verify(output)
    kept = {path.name: stamp(path) for path in output.iterdir() if path.name not in names}
    assert kept.items() <= before.items()
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(("shard", "layers"), [(1, []), (2, [0]), (3, [0, 1])])
def test_layers_after_the_damage_are_not_run(damaged, tiny_recipe, whole, shard, layers):
    output = damaged(lambda out: flip(out / f"model-{shard:05d}-of-00003.safetensors"))
    told = Told()
    pipeline.repair(tiny_recipe(), told)
    assert told.layers == layers
    assert tree(output) == tree(whole)


def test_nothing_is_repaired_where_nothing_is_damaged(damaged, tiny_recipe):
    output = damaged(lambda out: None)
    before = {path.name: stamp(path) for path in output.iterdir()}
    told = Told()
    pipeline.repair(tiny_recipe(), told)
    assert told.names == []
    assert {path.name: stamp(path) for path in output.iterdir()} == before


def test_the_evaluation_stays(damaged, tiny_recipe):
    def change(output: Path) -> None:
        (output / "evaluation").mkdir()
        (output / "evaluation" / "report.json").write_text("{}")
        seal_evaluation(output / "evaluation" / "report.json")
        flip(output / SHARD)

    output = damaged(change)
    pipeline.repair(tiny_recipe())
    assert (output / "evaluation" / "report.json").read_text() == "{}"


def test_what_no_file_mends_is_named(damaged, tiny_recipe, whole):
    def change(output: Path) -> None:
        (output / "more.safetensors").write_bytes(b"x")
        flip(output / SHARD)

    output = damaged(change)
    with pytest.raises(FaultsFound, match=r"more\.safetensors"):
        pipeline.repair(tiny_recipe())
    (output / "more.safetensors").unlink()
    assert tree(output) == tree(whole)


def test_a_source_that_has_moved_repairs_the_same(
    damaged, tiny_recipe, tiny_release, whole, tmp_path
):
    source = shutil.copytree(tiny_release, tmp_path / "moved" / "source")
    output = damaged(lambda out: (flip(out / SHARD), (out / "config.json").unlink()))
    recipe = tiny_recipe(model={"path": str(source)}, eval={"samples": 9})
    pipeline.repair(recipe)
    assert tree(output) == tree(whole)


def test_another_recipe_repairs_nothing(damaged, tiny_recipe):
    output = damaged(lambda out: flip(out / SHARD))
    before = tree(output)
    with pytest.raises(InputError, match=r"of something else: recipe\.experts\.min_tokens was 32"):
        pipeline.repair(tiny_recipe(experts={"min_tokens": 1}))
    assert tree(output) == before


def test_other_bytes_than_before_change_nothing(damaged, tiny_recipe, tmp_path):
    """Without its report, a result is known by its checksums alone."""
    output = damaged(lambda out: (out / "quantization-report.json").unlink())
    before = tree(output)
    with pytest.raises(GateError, match="was made again with other bytes than this result had"):
        pipeline.repair(
            tiny_recipe(calibration={"text": "python-docs", "samples": 8, "length": 64})
        )
    assert tree(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_repaired(damaged, tiny_recipe, tmp_path):
    with pytest.raises(InputError, match="out: no such directory to repair; choose another output"):
        pipeline.repair(tiny_recipe())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="out: is not a result of grokquant, so it cannot be"):
        pipeline.repair(tiny_recipe())
    shutil.rmtree(tmp_path / "out")

    def change(output: Path) -> None:
        (output / "quantization-report.json").unlink()
        (output / "SHA256SUMS").write_text("")

    damaged(change)
    with pytest.raises(InputError, match="out: cannot be repaired, since neither"):
        pipeline.repair(tiny_recipe())
