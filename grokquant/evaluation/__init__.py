"""What quantization cost: the same tokens through both models, figures, reports."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from pydantic import ValidationError

import grokquant
from grokquant import papers
from grokquant.calibration.text import TextRows, load_documents, rows_of, text_digest
from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.devices import CPU
from grokquant.errors import InputError
from grokquant.evaluation import report as parts
from grokquant.evaluation.cache import Cache
from grokquant.evaluation.compare import LayerDone, compare_checkpoints
from grokquant.evaluation.estimates import figures_of, noise_floor, routing
from grokquant.evaluation.html import write_report
from grokquant.evaluation.report import Report
from grokquant.evaluation.suite_tables import tasks_markdown
from grokquant.evaluation.tables import markdown_table
from grokquant.output import REPORT_NAME
from grokquant.recipe import EvalSection, load_recipe, parse_size
from grokquant.tokenizer import load_tokenizer
from grokquant.types import Scheme

# What two models must share, as their configs call it, to be compared token by token.
_SAME = (
    "num_hidden_layers",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "hidden_size",
    "vocab_size",
)


def settings_of(
    output: str | Path,
    data: str | None = None,
    samples: int | None = None,
    length: int | None = None,
) -> EvalSection:
    """The eval section of the recipe that made `output`, or the defaults, with what is given.

    Raises InputError where that recipe or the name of the text cannot be used.
    """
    recipe = Path(output) / "recipe.yaml"
    settings = load_recipe(recipe).eval if recipe.is_file() else EvalSection()
    given = {"data": data, "samples": samples, "length": length}
    changes = {key: value for key, value in given.items() if value is not None}
    try:
        return EvalSection(**(settings.model_dump() | changes))
    except ValidationError as error:
        (key, *_), text = error.errors()[0]["loc"], error.errors()[0]["msg"]
        raise InputError(f"eval.{key}: {text.removeprefix('Value error, ')}") from None


def cache_at(
    directory: str | Path | None, budget: str, note: Callable[[str], None]
) -> Cache | None:
    """The cache in a directory that may grow to `budget`, such as 20GB; None without a directory.

    Raises InputError.
    """
    if directory is None:
        return None
    try:
        return Cache(Path(directory), parse_size(budget), note)
    except ValueError as error:
        raise InputError(f"the size of the cache: {error}") from None


def evaluate(
    quantized: str | Path,
    reference: str | Path,
    settings: EvalSection | None = None,
    layer_done: LayerDone | None = None,
    device: torch.device = CPU,
    forced: bool = True,
    cache: Cache | None = None,
) -> Report:
    """Runs both checkpoints over the same held-out tokens, block by block, on `device`.

    `settings` default to those of the recipe that made `quantized`. With `forced` each layer is
    also measured alone; a `cache` keeps what the reference did for the next evaluation. Raises
    InputError where the two cannot be compared.
    """
    settings = settings or settings_of(quantized)
    candidate, base = open_checkpoint(quantized), open_checkpoint(reference)
    _check_comparable(candidate, base)
    own, theirs = _unit_rows(candidate), _unit_rows(base)
    documents = load_documents(settings.data, "heldout")
    rows = _rows(settings, documents, base)
    comparison = compare_checkpoints(
        candidate, base, rows.tokens, layer_done, device, forced, cache
    )
    return Report(
        grokquant=grokquant.__version__,
        quantized=_describe(candidate, quantized, own),
        reference=_describe(base, reference, theirs),
        protocol=_protocol(settings, documents, rows.tokens),
        noise_floor=noise_floor(comparison.noise),
        routing=routing(comparison),
        layers=tuple(parts.Layer(**asdict(layer)) for layer in comparison.layers),
        units=own,
        **figures_of(comparison.figures, rows.documents[:, 1:]),
    )


def publish(report: Report, output: Path, directory: Path | None = None) -> tuple[Path, Path]:
    """Writes report.json and report.html (default: `output`/evaluation) and fills the card."""
    paths = write_report(report, directory or output / "evaluation")
    if (output / REPORT_NAME).is_file():
        tables = [markdown_table(report), *tasks_markdown(report)]
        try:
            papers.fill_evaluation(output, "\n".join(tables))
        except (OSError, UnicodeError) as error:
            raise InputError(f"{output / papers.CARD_NAME}: cannot be filled in: {error}") from None
    return paths


def _check_comparable(candidate: Checkpoint, base: Checkpoint) -> None:
    for field in _SAME:
        found, expected = (getattr(c.config, field, None) for c in (candidate, base))
        if found != expected:
            raise InputError(
                f"{candidate.source.path}: {field} is {found}, the reference has {expected}"
            )


def _rows(settings: EvalSection, documents: list[str], base: Checkpoint) -> TextRows:
    """Windows of the text, no longer than the model has positions."""
    tokenizer = load_tokenizer(base)
    length = min(settings.length, base.config.max_position_embeddings)
    try:
        return rows_of(documents, tokenizer, settings.samples, length, None)
    except InputError as error:
        raise InputError(f"eval.data: {settings.data}: {error}") from None


def _protocol(settings: EvalSection, documents: list[str], rows: torch.Tensor) -> parts.Protocol:
    return parts.Protocol(
        text="python-docs, held-out part" if settings.data == "python-docs" else settings.data,
        text_sha256=text_digest(documents),
        windows=rows.shape[0],
        length=rows.shape[1],
        tokens_scored=rows.shape[0] * (rows.shape[1] - 1),
        scored="every token but the first of each window",
        bos=False,
        arithmetic="float32 on the stored weights, integers multiplied out to bf16",
    )


def _describe(
    checkpoint: Checkpoint, path: str | Path, rows: tuple[parts.UnitRow, ...]
) -> parts.Checkpoint:
    """What is stored; the methods are those of the quantization report's `rows`."""
    methods = {row.name: f" ({row.method})" for row in rows}
    grids = Counter(ref.stored_as + methods.get(name, "") for name, ref in checkpoint.units())
    return parts.Checkpoint(
        path=str(path),
        family=checkpoint.family.name,
        layers=checkpoint.config.num_hidden_layers,
        experts=max(checkpoint.num_experts, 1),
        parameters=checkpoint.parameters,
        bytes=checkpoint.stored_bytes,
        bits_per_weight=checkpoint.bits_per_weight,
        schemes=grids,
    )


def _unit_rows(checkpoint: Checkpoint) -> tuple[parts.UnitRow, ...]:
    """The rows of the quantization report beside a checkpoint, none where there is no report."""
    path = checkpoint.source.path / REPORT_NAME
    if not path.is_file():
        return ()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["units"]
        return tuple(_unit_row(row) for row in rows)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: is not a quantization report of this version") from None


def _unit_row(row: dict) -> parts.UnitRow:
    known = {key: value for key, value in row.items() if key in parts.UnitRow.model_fields}
    return parts.UnitRow(**known | {"scheme": str(Scheme(**row["scheme"]))})
