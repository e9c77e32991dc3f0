"""Whether a result is what its recipe and its config make: matrices, files, papers."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

from grokquant.containers import container_of
from grokquant.errors import InputError
from grokquant.files.json_objects import MAX_BYTES, read_json_object
from grokquant.files.regular import open_regular, read_regular
from grokquant.grids import Scheme
from grokquant.job import metadata, source_model
from grokquant.job.fingerprint import settings_of, without_paths
from grokquant.job.finished import MADE_FROM
from grokquant.job.plan import Plan
from grokquant.job.seal import FILES
from grokquant.job.shards import REPORT_NAME
from grokquant.job.source_model import ModelFingerprint, kept_fingerprint_of
from grokquant.job.unit import stored_bits
from grokquant.job.verify.fault import Fault
from grokquant.methods import METHODS
from grokquant.text.tokenizer import AUTO_MAP, tokenizer_digest
from grokquant.text.tokenizer import CONFIG as TOKENIZER_CONFIG
from grokquant.types import Unit, UnitReport

CONFIG_NAME = "config.json"


def all_faults(directory: Path, plan: Plan, report: Mapping) -> Iterator[Fault]:
    """Everything in which a result differs from its `plan`, but for the values of tensors."""
    found = {name: ref.scheme for name, ref in plan.checkpoint.units()}
    yield from unit_faults(plan, found)
    yield from header_faults(directory, plan)
    yield from recipe_faults(directory, plan)
    yield from config_faults(directory, plan, report)
    yield from code_faults(directory, plan)
    if report:
        yield from report_faults(directory, plan, report)
        yield from origin_faults(directory, plan, report)


def unit_faults(plan: Plan, found: Mapping[str, Scheme | None]) -> Iterator[Fault]:
    """Matrices that are not stored on their planned grid; `found` are the stored grids by name."""
    for name, unit in plan.units.items():
        file = plan.file_of[plan.parts_of(unit.tensor)[0]].name
        if name not in found:
            yield Fault(f"{name}: planned, but missing from the output", file)
        elif found[name] != unit.scheme:
            stored = found[name] or "bf16"
            yield Fault(f"{name}: planned as {unit.scheme}, but stored as {stored}", file)


def header_faults(directory: Path, plan: Plan) -> Iterator[Fault]:
    """Weight files whose headers list other tensors or metadata than planned."""
    container = container_of(plan.recipe.output.format)
    names = {file.name for file in plan.files}
    for path in plan.checkpoint.source.weight_files:
        if path.name not in names:
            yield Fault(f"{path}: is not among the files that the recipe makes")
    for file in plan.files:
        path = directory / file.name
        if not path.is_file():
            yield Fault(f"{path}: planned, but missing", file.name)
            continue
        if path.stat().st_size != file.layout.size:
            yield Fault(f"{path}: planned with {file.layout.size} bytes", file.name)
        planned = container.listed(BytesIO(file.layout.header), file.name)
        try:
            with open_regular(path) as stored:
                found = container.listed(stored, str(path))
        except InputError as error:
            yield Fault(str(error), file.name)
            continue
        for key in {**planned, **found}:
            if found.get(key) != planned.get(key):
                text = f"{key}: planned as {planned.get(key)}, but stored as {found.get(key)}"
                yield Fault(f"{path}: {text}", file.name)


def recipe_faults(directory: Path, plan: Plan) -> Iterator[Fault]:
    """A recipe that says the same in other words, or has comments of somebody else."""
    path = directory / metadata.RECIPE_NAME
    if path.read_text(encoding="utf-8") != metadata.published_recipe(plan):
        yield Fault(f"{path}: is not as grokquant writes it", metadata.RECIPE_NAME)


def config_faults(directory: Path, plan: Plan, report: Mapping) -> Iterator[Fault]:
    """The JSON files that follow from the plan: config.json and what belongs to it."""
    config = metadata.output_config(_with_config_of_source(plan, report))
    container = container_of(plan.recipe.output.format)
    planned = container.sidecar_files(plan.output_layout) | plan.format.sidecar_files(config)
    for name, content in ({CONFIG_NAME: config} | planned).items():
        path = directory / name
        try:
            found = read_json_object(path)
        except InputError as error:
            yield Fault(str(error), name)
            continue
        found, content = without_paths(found), without_paths(content)
        for key in {**content, **found}:
            if found.get(key) != content.get(key):
                yield Fault(f"{path}: {key} is not what source and recipe make", name)


def code_faults(directory: Path, plan: Plan) -> Iterator[Fault]:
    """Code beside the weights, and names of code, that this version does not write."""
    code = plan.remote_code
    if code:
        path = directory / code.file
        if not path.is_file():
            yield Fault(f"{path}: planned, but missing", code.file)
        elif read_regular(path, MAX_BYTES) != code.text().encode():
            text = "is not the code that this version of grokquant writes"
            yield Fault(f"{path}: {text}", code.file)
    path = directory / TOKENIZER_CONFIG
    try:
        named = read_json_object(path).get(AUTO_MAP) if path.is_file() else None
    except InputError as error:
        yield Fault(str(error), TOKENIZER_CONFIG)
        return
    if named not in (None, code and code.tokenizer_auto_map):
        yield Fault(f"{path}: {AUTO_MAP} names code of somebody else", TOKENIZER_CONFIG)


def _with_config_of_source(plan: Plan, report: Mapping) -> Plan:
    """The plan with the config that the report notes of the source, which has no quantization."""
    noted = report.get(MADE_FROM)
    config = noted.get("config") if isinstance(noted, dict) else None
    if not isinstance(config, dict):
        return plan  # named with the report
    source = replace(plan.checkpoint.source, config=config)
    return replace(plan, checkpoint=replace(plan.checkpoint, source=source))


def origin_faults(directory: Path, plan: Plan, report: Mapping) -> Iterator[Fault]:
    """Where recipe, tokenizer or what is kept is not that of the source that the report notes."""
    path = directory / REPORT_NAME
    try:
        noted = report[MADE_FROM]
        if noted["recipe"] != settings_of(plan.recipe):
            yield Fault(f"{path}: {MADE_FROM}.recipe is not recipe.yaml", REPORT_NAME)
        for name, digest in noted["tokenizer"].items():
            if _is_other_tokenizer(directory, name, report[FILES], digest):
                yield Fault(f"{directory / name}: is not the tokenizer of the source", name)
        known = ModelFingerprint.model_validate(report[source_model.KEY][0])
        own = kept_fingerprint_of(plan.checkpoint)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        yield Fault(f"{path}: cannot be read: {type(error).__name__} {error}", REPORT_NAME)
        return
    except InputError as error:
        yield Fault(str(error))
        return
    yield from _fingerprint_faults(directory, plan, known, own)


def _is_other_tokenizer(directory: Path, name: str, files: Mapping, digest: str) -> bool:
    """Whether a tokenizer's file is not that of the source with this digest; damage is named
    elsewhere."""
    if name != TOKENIZER_CONFIG or name not in files:
        return files.get(name) != digest
    return (directory / name).is_file() and tokenizer_digest(directory / name) != digest


def _fingerprint_faults(
    directory: Path, plan: Plan, known: ModelFingerprint, own: ModelFingerprint
) -> Iterator[Fault]:
    path = directory / CONFIG_NAME
    for key in {**known.config, **own.config}:
        if known.config.get(key) != own.config.get(key):
            yield Fault(f"{path}: {key} is not that of the source", CONFIG_NAME)
    if known.tokenizer != own.tokenizer:
        yield Fault(f"{directory}: its tokenizer cuts texts unlike that of the source")
    if any(METHODS[unit.method].revises for unit in plan.units.values()):
        return
    for name, checksum in own.tensors.items():
        if known.tensors.get(name) != checksum and name not in plan.refitted:
            file = plan.file_of[name].name
            yield Fault(f"{directory / file}: {name} is not that of the source", file)


def report_faults(directory: Path, plan: Plan, report: Mapping) -> Iterator[Fault]:
    """Where the report contradicts the plan, the files or itself."""
    path = directory / REPORT_NAME
    try:
        rows = [_unit_report(row) for row in report["units"]]
        counts = (report["tokens_per_expert"], report["calibration_rows"])
        record = metadata.Record(rows, *counts, made_from={})
        if [row.name for row in rows] != list(plan.units):
            text = "units are not the matrices that the recipe quantizes"
            yield Fault(f"{path}: {text}", REPORT_NAME)
            return
        planned = metadata.report_of_plan(plan, record)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        text = f"cannot be read: {type(error).__name__} {error}"
        yield Fault(f"{path}: {text}", REPORT_NAME)
        return
    for key, value in planned.items():
        if report.get(key) != value:
            yield Fault(f"{path}: {key} does not agree with recipe and files", REPORT_NAME)
    yield from (Fault(f"{path}: {text}", REPORT_NAME) for text in _row_faults(plan, rows))


def _unit_report(row: dict[str, Any]) -> UnitReport:
    return UnitReport(**row | {"scheme": Scheme(**row["scheme"]), "seconds": 0.0})


def _row_faults(plan: Plan, rows: list[UnitReport]) -> Iterator[str]:
    for row, unit in zip(rows, plan.units.values(), strict=True):
        planned = (unit.scheme, _bits_per_weight(unit), _method(unit, row.fallback))
        if (row.scheme, row.bits_per_weight, row.method) != planned:
            yield f"{row.name}: grid, bits or method are not those of the recipe"


def _bits_per_weight(unit: Unit) -> float:
    return stored_bits(unit.scheme, unit.shape) / prod(unit.shape)


def _method(unit: Unit, fallback: str | None) -> str:
    other = METHODS[unit.method].fallback
    return other.name if fallback and other else unit.method
