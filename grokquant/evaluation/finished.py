"""An evaluation that is there already: whether it is the one that is asked for."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grokquant.errors import InputError
from grokquant.evaluation.models import Models
from grokquant.evaluation.report import JSON_NAME, Report, read_report
from grokquant.evaluation.suite import Suite
from grokquant.files.atomic import sha256
from grokquant.job.fingerprint import contents_of, difference
from grokquant.text.documents import load_documents, text_digest

# Packages whose arithmetic and tasks the figures depend on.
_PACKAGES = ("grokquant", "torch", "transformers")
_DIGITS = 16  # of a checksum that people may have to read


def identity_of(models: Models, suite: Suite, forced: bool) -> dict:
    """All that determines the figures of an evaluation; JSON values only, without full paths.

    Raises InputError where a text cannot be read.
    """
    settings = suite.model_dump(mode="json", exclude_none=True)
    for row, text in zip(settings["texts"], suite.texts, strict=True):
        digest = text_digest(load_documents(text.text, "heldout", text.field))
        row["text"] = f"{Path(text.text).name} {digest[:_DIGITS]}"
    for row, task in zip(settings["tasks"], suite.tasks, strict=True):
        row["name"] = _name_of_task(Path(task.name))
    return {
        "quantized": _digest(contents_of(models.quantized)),
        "reference": _digest(contents_of(models.reference)),
        "suite": settings,
        "layers in isolation": forced,
        "products of experts": str(models.products).removeprefix("torch."),
        "version": {package: version(package) for package in _PACKAGES},
    }


def finished_evaluation(directory: Path, identity: dict[str, Any]) -> Report | None:
    """The report of the evaluation with this `identity`, None if `directory` has no report.

    Raises InputError, with the ways out, where it has one of something else.
    """
    if not (directory / JSON_NAME).is_file():
        return None
    try:
        report = read_report(directory)
    except InputError as error:
        differs: str | None = f"it cannot be read ({error})"
    else:
        differs = _what_differs(report, identity)
    if differs is None:
        return report
    raise InputError(
        f"{directory}: holds an evaluation of something else: {differs}; choose another "
        "output.path, or overwrite=True replaces it once the new one is complete"
    )


def _what_differs(report: Report, identity: dict[str, Any]) -> str | None:
    if report.made_from is None:
        return f"{JSON_NAME} does not say what it was made from"
    return difference(report.made_from, identity)


def _name_of_task(name: Path) -> str:
    """The name of a task of lm-eval; that of a file with its checksum."""
    return f"{name.name} {sha256(name)[:_DIGITS]}" if name.is_file() else str(name)


def _digest(content: dict) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
