"""A layer of Grok-1's true shapes, recipes to quantize it by, and the command that does it."""

import json
from pathlib import Path

import measure
from make_release import write_random_grok

from grokquant.families.grok_model import Grok1Config
from grokquant.grids import GRIDS

INT4 = {"match": "layers.*.experts.*", "method": "rtn", "bits": 4, "group": 128}
COPY = {"match": "layers.*.attention.*", "method": "copy"}
# Rules by name; those of llama.cpp's grids make a GGUF file.
RULES = {
    "int4-absmax": [INT4 | {"scale": "absmax"}, COPY],
    "int4-mse": [INT4 | {"scale": "mse"}, COPY],
    "int8-lossless": [{"match": "layers.*", "method": "copy"}],
}
RULES |= {
    f"{name}-absmax": [{"match": "layers.*", "method": "rtn", "grid": name, "scale": "absmax"}]
    for name, grid in GRIDS.items()
    if grid.ggml_type is not None
}


def release_at(given: Path | None, work: Path, **sizes: int) -> Path:
    """The release that was given, or a new one of one layer in `work`; `sizes` of its config that
    are not Grok-1's."""
    if given is None:
        given = work / "release"
        write_random_grok(given, Grok1Config(num_hidden_layers=1, **sizes))
    return given


def quantize_command(rules: str, release: Path, output: Path) -> list[str]:
    """The command that makes `output` by RULES[rules]; its recipe is written beside it."""
    recipe = output.with_name(f"{output.name}.yaml")
    of_llama_cpp = "grid" in RULES[rules][0]
    place = {"path": str(output), "format": "gguf" if of_llama_cpp else "compressed-tensors"}
    values = {"quantize": RULES[rules], "output": place}
    recipe.write_text(json.dumps({"model": {"path": str(release)}} | values))
    return [*measure.GROKQUANT, "quantize", str(recipe)]
