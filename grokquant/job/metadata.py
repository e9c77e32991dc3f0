"""The papers of an output: config, resolved recipe, report by unit, tokenizer files, model card."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from grokquant.containers import container_of
from grokquant.files.atomic import write_json, write_text
from grokquant.humanize import size
from grokquant.job.plan import Plan
from grokquant.job.shards import CARD_NAME, REPORT_NAME
from grokquant.text import tokenizer
from grokquant.types import UnitReport
from grokquant.version import MARK, OWN

_NOT_COPIED = ("auto_map", "dtype", "quantization_config")
# The evaluation table of the card stands between these; `grokquant eval` fills it.
TABLE_START = "<!-- evaluation -->"
TABLE_END = "<!-- /evaluation -->"


@dataclass(frozen=True)
class Record:
    """What a run did: a report per unit, tokens per expert layer by layer, and the calibration
    rows and their length (nothing where no data was needed)."""

    units: list[UnitReport]
    tokens_per_expert: list[list[int]]
    calibration_rows: tuple[int, ...]


def write_tokenizer(directory: Path, plan: Plan) -> None:
    """First of all, so that a broken tokenizer costs no night."""
    tokenizer.write_tokenizer(plan.checkpoint.source, directory)


def write(directory: Path, plan: Plan, record: Record) -> None:
    """Writes the papers of a finished run into `directory`; config.json, which makes a directory
    loadable, last."""
    container = container_of(plan.recipe.output.format)
    config = output_config(plan)
    others = container.sidecar_files(plan.output_layout) | plan.format.sidecar_files(config)
    for name, content in others.items():
        write_json(directory / name, content)
    write_text(directory / "recipe.yaml", plan.recipe.to_yaml())
    write_json(directory / REPORT_NAME, quantization_report(plan, record))
    write_text(directory / CARD_NAME, model_card(plan, record.units))
    write_json(directory / "generation_config.json", generation_config(plan))
    write_json(directory / "config.json", config)


def output_config(plan: Plan) -> dict:
    """The source's config with what was quantized how."""
    matrices = plan.checkpoint.matrices()
    kept = [m.tensor for m in matrices if m.tensor not in plan.unit_of_tensor]
    routers = plan.checkpoint.family.routers(plan.checkpoint.config)
    unquantized = [name.removesuffix(".weight") for name in [*kept, *routers]] + ["lm_head"]
    source = plan.checkpoint.source.config
    fields = {key: value for key, value in source.items() if key not in _NOT_COPIED}
    fields["torch_dtype"] = "bfloat16"
    # transformers would look for other files than gguf's, and for other names of biased experts.
    loaded_by_us = plan.format.needs_own_loader or plan.checkpoint.family.biased
    if plan.units or loaded_by_us:
        described = plan.format.quantization_config(plan.units.values(), unquantized)
        fields["quantization_config"] = described | {MARK: OWN}
    return fields


def generation_config(plan: Plan) -> dict:
    config = plan.checkpoint.source.config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}


def quantization_report(plan: Plan, record: Record) -> dict:
    """What was done, a row per unit. Times are left out: the same run gives the same bytes."""
    return {
        "schema": "grokquant.quantization/1",
        "family": plan.checkpoint.family.name,
        "source": str(plan.recipe.model.path),
        "output_bytes": plan.output_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "parameters": plan.checkpoint.parameters,
        "schemes": scheme_counts(record.units),
        "fallbacks": [unit.name for unit in record.units if unit.fallback],
        "calibration_rows": list(record.calibration_rows),
        "tokens_per_expert": record.tokens_per_expert,
        "kept": list(plan.kept),
        "units": [_row(report) for report in record.units],
    }


def scheme_counts(reports: list[UnitReport]) -> dict[str, int]:
    """How many matrices have which grid by which method: {"int4 g128 sym (gptq)": 96}."""
    return dict(Counter(f"{r.scheme} ({r.method})" for r in reports))


def model_card(plan: Plan, reports: list[UnitReport]) -> str:
    source = plan.checkpoint.source
    name = _base_name(plan)
    rows = "\n".join(f"| {scheme} | {n} |" for scheme, n in scheme_counts(reports).items())
    licence = f"license: {source.licence}\n" if source.licence else ""
    fallen = [f"* `{r.name}`: {r.fallback}" for r in reports if r.fallback]
    fallbacks = "\n".join(["", "Rounded without data, and why:", "", *fallen, ""] if fallen else [])
    return f"""---
base_model: {name}
base_model_relation: quantized
quantized_by: grokquant
{licence}tags:
- {plan.checkpoint.family.name}
- mixture-of-experts
- {plan.recipe.output.format}
---
# {Path(plan.recipe.output.path).name}

A quantized {plan.checkpoint.family.name} of {plan.checkpoint.parameters:,} weights, \
{plan.bits_per_weight:.2f} bits per weight ({size(plan.output_bytes)}), made by grokquant \
from `{name}`. "bf16" below is that source with its stored integers multiplied out.

## What was quantized

| grid (method) | matrices |
|---|---|
{rows}

Router, norms and embedding are as in the source{_kept_sentence(plan)}. Every matrix has a row in
`{REPORT_NAME}`; `recipe.yaml` makes the same files again.
{fallbacks}
## Evaluation

{TABLE_START}
Not evaluated yet: `grokquant eval` of this directory against its source fills this in.
{TABLE_END}

## Loading

```python
import grokquant

model, tokenizer = grokquant.load("{Path(plan.recipe.output.path).name}")
```
"""


def fill_evaluation(directory: Path, table: str) -> None:
    """Puts `table` into the model card of an output of ours."""
    path = directory / CARD_NAME
    if not path.is_file():
        return
    card = path.read_text(encoding="utf-8")
    before, start, rest = card.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if start and end:
        write_text(path, f"{before}{start}\n{table.strip()}\n{end}{after}")


def _base_name(plan: Plan) -> str:
    """What the source is called: the last folder of its path that is not ckpt-0."""
    path = Path(plan.recipe.model.path).absolute()
    return path.parent.name if path.name == "ckpt-0" else path.name


def _kept_sentence(plan: Plan) -> str:
    return f", and so are {len(plan.kept)} matrices that the recipe keeps" if plan.kept else ""


def _row(report: UnitReport) -> dict:
    row = asdict(report)
    del row["seconds"]
    return row | {"scheme": asdict(report.scheme)}
