"""The metadata files of an output: config, resolved recipe, report, tokenizer, model card."""

from dataclasses import asdict, dataclass
from pathlib import Path

from grokquant.containers import container_of
from grokquant.escaping import one_line
from grokquant.files.atomic import copy_file, write_json, write_text
from grokquant.files.published import is_repository, published_path
from grokquant.job import source_model
from grokquant.job.card import model_card, scheme_counts, unusual
from grokquant.job.finished import MADE_FROM
from grokquant.job.plan import Plan
from grokquant.job.shards import CARD_NAME
from grokquant.recipe import Recipe
from grokquant.text import tokenizer
from grokquant.types import UnitReport
from grokquant.version import MARK, OWN

GENERATION_CONFIG = "generation_config.json"
RECIPE_NAME = "recipe.yaml"
ORIGIN = "origin"  # the key of what is known of the source beside its weights
SCHEMA = "grokquant.quantization/2"  # of the report
_DTYPES = ("bfloat16", "float16", "float32")
_NOT_COPIED = ("dtype", "quantization_config")


@dataclass(frozen=True)
class Provenance:
    """What a result says of how it was made: its recipe, and the identity of its run."""

    recipe: Recipe
    made_from: dict


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
    return tokenizer.write_tokenizer(plan.checkpoint.source, directory, plan.remote_code)


def write(directory: Path, plan: Plan, record: Record) -> None:
    """Writes the metadata files of a finished run into `directory`, but for those of `seal`.
    config.json comes last, since it makes the directory loadable."""
    container = container_of(plan.recipe.output.format)
    config = output_config(plan)
    others = container.sidecar_files(plan.output_layout) | plan.format.sidecar_files(config)
    for name, content in others.items():
        write_json(directory / name, content)
    if plan.remote_code:
        write_text(directory / plan.remote_code.file, plan.remote_code.text())
    write_text(directory / RECIPE_NAME, published_recipe(plan))
    write_text(directory / CARD_NAME, model_card(plan, record.units))
    if GENERATION_CONFIG not in plan.checkpoint.source.beside:
        write_json(directory / GENERATION_CONFIG, generation_config(plan))
    write_json(directory / "config.json", config)


def output_config(plan: Plan) -> dict:
    """The source's config with a description of the quantization."""
    matrices = plan.checkpoint.matrices()
    family = plan.checkpoint.family
    kept = [m.tensor for m in matrices if m.tensor not in plan.unit_of_tensor]
    modules = map(family.module_weight, kept)
    routers = family.routers(plan.checkpoint.config)
    names = dict.fromkeys([*kept, *modules, *routers])
    unquantized = [name.removesuffix(".weight") for name in names] + ["lm_head"]
    source = plan.checkpoint.source.config
    fields = {key: value for key, value in source.items() if key not in _NOT_COPIED}
    fields |= family.engine_fields(plan.checkpoint.config)
    if not is_repository(fields.get("_name_or_path")):
        fields.pop("_name_or_path", None)  # a place on the machine that saved it
    fields["torch_dtype"] = stated_dtype(plan)
    if plan.remote_code:
        fields[tokenizer.AUTO_MAP] = plan.remote_code.auto_map
    # transformers would look for other files than gguf's, and for other names of matrices.
    loaded_by_us = plan.format.needs_own_loader or family.names_experts or bool(family.turned)
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


def published_recipe(plan: Plan) -> str:
    """The recipe with all defaults and without absolute paths, and what to fill in to run it."""
    origin = plan.checkpoint.source.origin
    model = origin.base_model or one_line(origin.name)
    head = (
        "# The recipe of the files beside it, with all defaults. Absolute paths were shortened to\n"
        f"# names: to run it again, set model.path to a directory with {model},\n"
        "# output.path to a new directory, and texts in files to where you have them.\n"
    )
    return head + plan.recipe.published().to_yaml()


def quantization_report(plan: Plan, record: Record) -> dict:
    """The report, one row per unit. It has no times, so that equal runs give equal bytes."""
    models = source_model.source_models(plan.checkpoint)
    made_from = {MADE_FROM: record.made_from, source_model.KEY: models}
    return made_from | report_of_plan(plan, record)


def report_of_plan(plan: Plan, record: Record) -> dict:
    """The part of a report that does not need the source again."""
    origin = plan.checkpoint.source.origin
    # Reports of earlier versions have no such key.
    refitted = {"refitted": plan.refitted} if plan.refitted else {}
    return refitted | {
        "schema": SCHEMA,
        "family": plan.checkpoint.family.name,
        "source": origin.base_model or published_path(plan.recipe.model.path),
        ORIGIN: asdict(origin) | {"languages": list(origin.languages)},
        "output_bytes": plan.output_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "parameters": plan.checkpoint.parameters,
        "schemes": scheme_counts(record.units, plan.format),
        "fallbacks": [unit.name for unit in record.units if unit.fallback],
        "findings": unusual(plan, record.units),
        "calibration_rows": list(record.calibration_rows),
        "tokens_per_expert": record.tokens_per_expert,
        "kept": list(plan.kept),
        "units": [_row(report) for report in record.units],
    }


def _row(report: UnitReport) -> dict:
    row = asdict(report)
    del row["seconds"]
    if report.held_out_error is None:  # as in reports of earlier versions
        del row["held_out_error"]
    return row | {"scheme": asdict(report.scheme)}
