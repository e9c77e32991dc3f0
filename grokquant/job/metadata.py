"""The metadata files of an output: config, resolved recipe, report, tokenizer, model card."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from grokquant.containers import container_of
from grokquant.escaping import markdown_code, markdown_text, python_string
from grokquant.files.atomic import copy_file, write_json, write_text
from grokquant.humanize import size
from grokquant.job import source_model
from grokquant.job.findings import findings, listed
from grokquant.job.finished import MADE_FROM
from grokquant.job.plan import Plan
from grokquant.job.shards import CARD_NAME, REPORT_NAME
from grokquant.text import tokenizer
from grokquant.types import UnitReport
from grokquant.version import MARK, OWN

GENERATION_CONFIG = "generation_config.json"
_DTYPES = ("bfloat16", "float16", "float32")
_NOT_COPIED = ("dtype", "quantization_config")
# `grokquant eval` writes the evaluation table of the card between these.
TABLE_START = "<!-- evaluation -->"
TABLE_END = "<!-- /evaluation -->"


@dataclass(frozen=True)
class Record:
    """The record of a run: a report per unit, tokens per expert layer by layer, number and length
    of the calibration rows (empty if none were needed), and the identity of the run."""

    units: list[UnitReport]
    tokens_per_expert: list[list[int]]
    calibration_rows: tuple[int, ...]
    made_from: dict


def write_beside(directory: Path, plan: Plan) -> list[str]:
    """Copies what lies beside the source's weights.

    Done first, so that a broken tokenizer ends the run at once. Returns contradictions.
    """
    for name, path in plan.checkpoint.source.beside.items():
        (directory / name).parent.mkdir(exist_ok=True)
        copy_file(path, directory, name)
    return tokenizer.write_tokenizer(plan.checkpoint.source, directory)


def write(directory: Path, plan: Plan, record: Record) -> None:
    """Writes the metadata files of a finished run into `directory`. config.json comes last, since
    it makes the directory loadable."""
    container = container_of(plan.recipe.output.format)
    config = output_config(plan)
    others = container.sidecar_files(plan.output_layout) | plan.format.sidecar_files(config)
    for name, content in others.items():
        write_json(directory / name, content)
    write_text(directory / "recipe.yaml", plan.recipe.to_yaml())
    write_json(directory / REPORT_NAME, quantization_report(plan, record))
    write_text(directory / CARD_NAME, model_card(plan, record.units))
    if GENERATION_CONFIG not in plan.checkpoint.source.beside:
        write_json(directory / GENERATION_CONFIG, generation_config(plan))
    write_json(directory / "config.json", config)


def output_config(plan: Plan) -> dict:
    """The source's config with a description of the quantization."""
    matrices = plan.checkpoint.matrices()
    kept = [m.tensor for m in matrices if m.tensor not in plan.unit_of_tensor]
    routers = plan.checkpoint.family.routers(plan.checkpoint.config)
    unquantized = [name.removesuffix(".weight") for name in [*kept, *routers]] + ["lm_head"]
    source = plan.checkpoint.source.config
    fields = {key: value for key, value in source.items() if key not in _NOT_COPIED}
    fields |= plan.checkpoint.family.engine_fields(plan.checkpoint.config)
    fields["torch_dtype"] = stated_dtype(plan)
    # transformers would look for other files than gguf's, and for other names of biased experts.
    loaded_by_us = plan.format.needs_own_loader or plan.checkpoint.family.biased
    if plan.units or loaded_by_us:
        described = plan.format.quantization_config(plan.units.values(), unquantized)
        fields["quantization_config"] = described | {MARK: OWN}
    return fields


def stated_dtype(plan: Plan) -> str:
    """The dtype that the source's config names; bfloat16 for a release, whose config names none."""
    config = plan.checkpoint.source.config
    stated = config.get("dtype") or config.get("torch_dtype")
    return stated if stated in _DTYPES else "bfloat16"


def generation_config(plan: Plan) -> dict:
    config = plan.checkpoint.source.config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}


def quantization_report(plan: Plan, record: Record) -> dict:
    """The report, one row per unit. It has no times, so that equal runs give equal bytes."""
    return {
        "schema": "grokquant.quantization/1",
        "family": plan.checkpoint.family.name,
        "source": str(plan.recipe.model.path),
        MADE_FROM: record.made_from,
        "output_bytes": plan.output_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "parameters": plan.checkpoint.parameters,
        "schemes": scheme_counts(record.units),
        "fallbacks": [unit.name for unit in record.units if unit.fallback],
        "findings": _findings(plan, record.units),
        "calibration_rows": list(record.calibration_rows),
        "tokens_per_expert": record.tokens_per_expert,
        "kept": list(plan.kept),
        source_model.KEY: source_model.source_models(plan.checkpoint),
        "units": [_row(report) for report in record.units],
    }


def scheme_counts(reports: list[UnitReport]) -> dict[str, int]:
    """The number of matrices per grid and method: {"int4 g128 sym (gptq)": 96}."""
    return dict(Counter(f"{r.scheme} ({r.method})" for r in reports))


def model_card(plan: Plan, reports: list[UnitReport]) -> str:
    source = plan.checkpoint.source
    name = _base_name(plan)
    own_name = Path(plan.recipe.output.path).name
    rows = "\n".join(f"| {scheme} | {n} |" for scheme, n in scheme_counts(reports).items())
    licence = f"license: {source.licence}\n" if source.licence else ""
    fallen = [f"* `{r.name}`: {r.fallback}" for r in reports if r.fallback]
    fallbacks = "\n".join(["", "Fallbacks to round-to-nearest:", "", *fallen, ""] if fallen else [])
    unusual = [f"* {line}" for line in listed(_findings(plan, reports))]
    fallbacks += "\n".join(["", "Unusual losses:", "", *unusual, ""] if unusual else [])
    return f"""---
base_model: {name}
base_model_relation: quantized
quantized_by: grokquant
{licence}tags:
- {plan.checkpoint.family.name}
- mixture-of-experts
- {plan.recipe.output.format}
---
# {markdown_text(own_name)}

A quantized {plan.checkpoint.family.name} of {plan.checkpoint.parameters:,} weights, \
{plan.bits_per_weight:.2f} bits per weight ({size(plan.output_bytes)}), made by grokquant \
from {markdown_code(name)}. "bf16" below means that source, with any stored integers dequantized.

## What was quantized

| grid (method) | matrices |
|---|---|
{rows}

Router, norms and embedding are not quantized{_kept_sentence(plan)}. `{REPORT_NAME}`
has a row for every quantized matrix; `recipe.yaml` reproduces these files.
{fallbacks}
## Evaluation

{TABLE_START}
Not evaluated yet. `grokquant eval` with the source as reference writes the table here.
{TABLE_END}

## Loading

```python
import grokquant

model, tokenizer = grokquant.load({python_string(own_name)})
```
"""


def fill_evaluation(directory: Path, table: str) -> None:
    """Writes `table` into the model card of an output, if it has a place for it."""
    path = directory / CARD_NAME
    if not path.is_file():
        return
    card = path.read_text(encoding="utf-8")
    before, start, rest = card.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if start and end:
        write_text(path, f"{before}{start}\n{table.strip()}\n{end}{after}")


def _base_name(plan: Plan) -> str:
    """The name of the source: the last folder of its path other than ckpt-0."""
    path = Path(plan.recipe.model.path).absolute()
    return path.parent.name if path.name == "ckpt-0" else path.name


def _findings(plan: Plan, reports: list[UnitReport]) -> list[str]:
    return findings(reports, {name: unit.kind for name, unit in plan.units.items()})


def _kept_sentence(plan: Plan) -> str:
    return f", nor are {len(plan.kept)} matrices that the recipe keeps" if plan.kept else ""


def _row(report: UnitReport) -> dict:
    row = asdict(report)
    del row["seconds"]
    return row | {"scheme": asdict(report.scheme)}
