"""The model card of an output, README.md: front matter by the rules of the Hugging Face hub."""

import io
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from grokquant.engines import WRONG, verdicts, where_it_runs
from grokquant.escaping import markdown_code, markdown_text, one_line, python_string
from grokquant.files.atomic import write_text
from grokquant.formats import Format
from grokquant.humanize import size
from grokquant.job.card_parts import EVALUATION, NOT_EVALUATED, with_table
from grokquant.job.findings import findings, listed
from grokquant.job.plan import Plan
from grokquant.job.shards import CARD_NAME, REPORT_NAME
from grokquant.job.smaller_blocks import smaller_blocks
from grokquant.recipe import is_file, is_repository_text
from grokquant.types import UnitReport
from grokquant.version import OWN

# Text that needs no quotes in YAML, and words that are none in YAML 1.1.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._/-]*")
_NO_TEXT = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def model_card(plan: Plan, reports: list[UnitReport]) -> str:
    """The card of a result that has not been evaluated yet."""
    name = Path(plan.recipe.output.path).name
    sections = [
        f"---\n{_yaml(front_matter(plan))}---\n# {markdown_text(name)}",
        _summary(plan),
        "## What was quantized",
        _grids(plan, reports),
        *_listed("Fallbacks to round-to-nearest:", _fallbacks(reports)),
        *_listed("Unusual:", listed(unusual(plan, reports))),
        "## How it was made",
        _commands(plan),
        "## Evaluation",
        EVALUATION.marked(NOT_EVALUATED),
        "## Loading",
        _where_it_runs(plan),
        *_loading(plan, name),
    ]
    return "\n\n".join(sections) + "\n"


def fill_evaluation(directory: Path, table: str) -> None:
    """Writes `table` into the model card of an output, if it has a place for it."""
    path = directory / CARD_NAME
    if not path.is_file():
        return
    write_text(path, with_table(path.read_text(encoding="utf-8"), table))


def scheme_counts(reports: list[UnitReport], output_format: Format) -> dict[str, int]:
    """The number of matrices per grid and method: {"int4 g128 sym (gptq)": 96}."""
    return dict(Counter(f"{output_format.grid_name(r.scheme)} ({r.method})" for r in reports))


def front_matter(plan: Plan) -> dict[str, Any]:
    """What the hub reads, without what is not known.

    Keys: github.com/huggingface/hub-docs, modelcard.md.
    """
    origin = plan.checkpoint.source.origin
    values = {
        "license": origin.licence,
        "license_name": origin.licence_name,
        "license_link": origin.licence_link,
        "library_name": _library(plan),
        "pipeline_tag": "text-generation",
        "language": list(origin.languages),
        "base_model": origin.base_model,
        "base_model_relation": "quantized" if origin.base_model else None,
        "datasets": _datasets(plan),
        "quantized_by": OWN,
        "tags": _tags(plan),
    }
    return {key: value for key, value in values.items() if value}


def _library(plan: Plan) -> str:
    if plan.format.name == "gguf":
        return "gguf"
    return "transformers" if _in_transformers(plan) else OWN


def _in_transformers(plan: Plan) -> bool:
    """Whether transformers has the model itself, so that it needs us for some formats only."""
    return plan.checkpoint.family.config_class.__module__.startswith("transformers.")


def _datasets(plan: Plan) -> list[str]:
    """The calibration texts that are datasets of the hub."""
    texts = plan.recipe.calibration.shares if plan.needs_calibration else ()
    return [text.partition(":")[0] for text in texts if is_repository_text(text)]


def _tags(plan: Plan) -> list[str]:
    tags = [plan.checkpoint.family.name]
    if plan.checkpoint.num_experts:
        tags.append("mixture-of-experts")
    return [*tags, plan.format.name]


def _yaml(values: dict[str, Any]) -> str:
    """YAML that 1.1 and 1.2 read alike: Norwegian is `no`, which 1.1 takes for false."""
    values = {key: _quoted(value) for key, value in values.items()}
    yaml = YAML()
    yaml.width = 1 << 30  # never fold a long value
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue()


def _quoted(value: Any) -> Any:
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    plain = _PLAIN.fullmatch(value) and value.lower() not in _NO_TEXT
    return value if plain else DoubleQuotedScalarString(value)


def _summary(plan: Plan) -> str:
    checkpoint = plan.checkpoint
    origin = checkpoint.source.origin
    source = markdown_code(origin.name)
    if origin.base_model:
        source = f"[{origin.base_model}](https://huggingface.co/{origin.base_model})"
    text = (
        f"A quantized {checkpoint.family.name} of {checkpoint.parameters:,} weights, "
        f"{plan.bits_per_weight:.2f} bits per weight ({size(plan.output_bytes)}), made by "
        f"grokquant from {source}."
    )
    if any(ref.scheme for _, ref in checkpoint.units()):
        text += ' "bf16" below means that source with its stored integers dequantized.'
    return text


def _grids(plan: Plan, reports: list[UnitReport]) -> str:
    counts = scheme_counts(reports, plan.format)
    rows = "".join(f"| {grid} | {count} |\n" for grid, count in counts.items())
    kept = f", nor are {len(plan.kept)} matrices stored as floats" if plan.kept else ""
    return (
        f"| grid (method) | matrices |\n|---|---|\n{rows}\n"
        f"Router, norms and embedding are not quantized{kept}. `{REPORT_NAME}` has a row for every "
        "quantized matrix."
    )


def _fallbacks(reports: list[UnitReport]) -> list[str]:
    return [f"`{report.name}`: {report.fallback}" for report in reports if report.fallback]


def _listed(head: str, lines: list[str]) -> list[str]:
    return [head, "\n".join(f"* {line}" for line in lines)] if lines else []


def unusual(plan: Plan, reports: list[UnitReport]) -> list[str]:
    """Lines for matrices that have another type than the rest, or of which too much was lost."""
    kinds = {
        name: f"{unit.kind} in {plan.format.grid_name(unit.scheme)}"
        for name, unit in plan.units.items()
    }
    return [*smaller_blocks(plan.units.values()), *findings(reports, kinds)]


def _commands(plan: Plan) -> str:
    """The command that makes the same files from the recipe beside them."""
    recipe = plan.recipe.published()
    values = {"model.path": recipe.model.path, "output.path": recipe.output.path}
    if plan.needs_calibration and any(map(is_file, recipe.calibration.shares)):
        text = recipe.calibration.text
        values["calibration.text"] = text if isinstance(text, str) else json.dumps(text)
    settings = (f"{key}={one_line(value)}" for key, value in values.items())
    options = "".join(f" \\\n  --set {shlex.quote(setting)}" for setting in settings)
    return (
        "`recipe.yaml` reproduces these files; paths are those of your machine:\n\n"
        f"```sh\ngrokquant quantize recipe.yaml{options}\n```"
    )


def _where_it_runs(plan: Plan) -> str:
    """Which programs take the result; what would go wrong silently is bold."""
    lines = where_it_runs(plan.contents)
    return "\n".join(f"* **{line}**" if line.startswith(WRONG) else f"* {line}" for line in lines)


def _loading(plan: Plan, name: str) -> list[str]:
    """A way to load the result in every program that is known to read it."""
    place = python_string(name)
    ways = [
        f"With grokquant:\n\n```python\nimport grokquant\n\n"
        f"model, tokenizer = grokquant.load({place})\n```"
    ]
    alone = _in_transformers(plan) and not plan.units and not plan.format.needs_own_loader
    ours = "" if alone else "import grokquant  # transformers reads these files through it\n"
    ways.append(
        f"With transformers:\n\n```python\n{ours}from transformers import AutoModelForCausalLM, "
        f"AutoTokenizer\n\nmodel = AutoModelForCausalLM.from_pretrained({place})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place})\n```"
    )
    if code := plan.remote_code:
        ways.append(
            f"With transformers alone, by the Python in `{code.file}`. It is grokquant's, and "
            "`grokquant verify` compares it with what grokquant writes:\n\n```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({place}, trust_remote_code=True)\n"
            f"tokenizer = AutoTokenizer.from_pretrained({place}, trust_remote_code=True)\n```"
        )
    if plan.format.name == "gguf":
        first = shlex.quote(one_line(f"{name}/{plan.files[0].name}"))
        split = " (it finds the other files itself)" if len(plan.files) > 1 else ""
        ways.append(f"With llama.cpp{split}:\n\n```sh\nllama-cli -m {first}\n```")
    if verdicts(plan.contents)["vllm"] == "yes":
        ways.append(f"With vLLM:\n\n```sh\nvllm serve {shlex.quote(one_line(name))}\n```")
    return ways
