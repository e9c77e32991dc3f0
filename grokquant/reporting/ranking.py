"""Several evaluated models ranked: which is closest to the reference, and at what size.

Models of one protocol saw the same documents, so their differences are bootstrapped in pairs. The
intervals of these are far narrower than the models' own, which share what is hard about the text.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any, Literal

import numpy as np

from grokquant.errors import InputError
from grokquant.evaluation.bootstrap import Resampler
from grokquant.evaluation.report import JSON_NAME, Estimate, Report, read_report
from grokquant.files.published import published_path
from grokquant.files.unfinished import check_directory, work_path
from grokquant.reporting.rows import name_of
from grokquant.version import __version__

SCHEMA = "grokquant.comparison/1"
# Columns of a report's documents by which models are ranked; lower is better for both.
Loss = Literal["kld", "nll"]
Status = Literal["front", "tied", "behind"]
# Fields of the protocol that may differ: the checksum tells texts apart, whatever their names, and
# sequences were cut as `length` says, whatever was asked for.
_MAY_DIFFER = {"text", "asked_length"}
# The reference's perplexity tells it from other models; devices change less of it than this.
_SAME_PERPLEXITY = 1e-5


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its report, under a name that no other model of the ranking has."""

    name: str
    path: Path
    report: Report

    @property
    def bits_per_weight(self) -> float:
        return self.report.quantized.bits_per_weight

    @property
    def grid(self) -> str:
        """The grid of most of its matrices, with its method."""
        schemes = self.report.quantized.schemes
        return max(schemes, key=lambda name: schemes[name]) if schemes else "–"

    @property
    def format(self) -> str:
        return self.report.quantized.format or "–"


@dataclass(frozen=True)
class Standing:
    """Where a model stands by size and one loss.

    On the Pareto `front` no other model is better without being larger, or smaller without being
    worse. A model off the front is `tied` if none of the models that keep it off is significantly
    better (95 %), else `behind`; `beaten_by` names the best of those that are.
    """

    status: Status
    beaten_by: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        return {"place": self.status, "beaten_by": self.beaten_by}


@dataclass(frozen=True)
class RankedModel(EvaluatedModel):
    """`rank` is one more than the number of models with a significantly lower KLD."""

    rank: int
    kld: Standing
    perplexity: Standing

    def as_dict(self) -> dict[str, Any]:
        report = self.report
        return {
            "name": self.name,
            "path": published_path(str(self.path)),
            "bits_per_weight": self.bits_per_weight,
            "bytes": report.quantized.bytes,
            "grid": self.grid,
            "format": self.format,
            "kld": report.kld.mean.model_dump(mode="json"),
            "perplexity": report.perplexity.quantized.model_dump(mode="json"),
            "perplexity_ratio": report.perplexity.ratio.model_dump(mode="json"),
            "same_top_p": report.same_top_p.model_dump(mode="json"),
            "rank": self.rank,
            "kld_standing": self.kld.as_dict(),
            "perplexity_standing": self.perplexity.as_dict(),
            "layers": [
                {
                    "layer": layer.layer,
                    "relative_error": layer.relative_error,
                    "router_top1": layer.router_top1,
                    "router_set": layer.router_set,
                    "router_set_forced": layer.forced.router_set if layer.forced else None,
                }
                for layer in report.layers
            ],
        }


@dataclass(frozen=True)
class Ranking:
    """Models of one protocol and reference, the lowest mean KLD first."""

    models: tuple[RankedModel, ...]

    @property
    def report(self) -> Report:
        """The first model's; protocol, reference and noise floor are those of all."""
        return self.models[0].report

    def as_dict(self) -> dict[str, Any]:
        """The content of `grokquant compare --json`, all of it taken from the reports."""
        return {
            "schema": SCHEMA,
            "grokquant": __version__,
            "reference": self.report.reference.model_dump(mode="json"),
            "protocol": self.report.protocol.model_dump(mode="json"),
            "noise_floor": self.report.noise_floor.model_dump(mode="json"),
            "runs": [model.as_dict() for model in self.models],
        }


def rank_models(runs: Sequence[str | Path | Report]) -> Ranking:
    """Ranks `runs`: reports, or where they are (results, evaluation directories, report.json).

    Raises InputError where there is no report, or where two cannot be compared.
    """
    models = _named([_read(run) for run in runs])
    for model in models[1:]:
        _check_comparable(model, models[0])
    models.sort(key=lambda model: model.report.kld.mean.value)
    return Ranking(tuple(_ranked(model, models) for model in models))


def difference(model: EvaluatedModel, other: EvaluatedModel, loss: Loss) -> Estimate:
    """Mean `loss` per token, `model` minus `other`, by a paired bootstrap over documents."""
    documents = model.report.documents
    columns = (
        documents.tokens,
        getattr(documents, loss),
        getattr(other.report.documents, loss),
    )
    sums = np.stack([np.array(column, dtype=np.float64) for column in columns], axis=-1)
    settings = model.report.bootstrap
    drawn = Resampler(sums, settings.resamples, settings.seed)
    return drawn.estimate(lambda s: (s[..., 1] - s[..., 2]) / s[..., 0])


def _ranked(model: EvaluatedModel, models: Sequence[EvaluatedModel]) -> RankedModel:
    better = sum(_significantly_better(other, model, "kld") for other in models)
    return RankedModel(
        name=model.name,
        path=model.path,
        report=model.report,
        rank=1 + better,
        kld=_standing(model, models, "kld"),
        perplexity=_standing(model, models, "nll"),
    )


def _standing(model: EvaluatedModel, models: Sequence[EvaluatedModel], loss: Loss) -> Standing:
    ahead = [other for other in models if _dominates(other, model, loss)]
    ahead.sort(key=lambda other: _mean(other, loss))
    for other in ahead:
        if _significantly_better(other, model, loss):
            return Standing("behind", other.name)
    return Standing("tied" if ahead else "front")


def _mean(model: EvaluatedModel, loss: Loss) -> float:
    documents = model.report.documents
    return sum(getattr(documents, loss)) / sum(documents.tokens)


def _dominates(other: EvaluatedModel, model: EvaluatedModel, loss: Loss) -> bool:
    """Whether `other` is no larger and no worse, and differs."""
    theirs = (other.bits_per_weight, _mean(other, loss))
    own = (model.bits_per_weight, _mean(model, loss))
    return theirs != own and theirs[0] <= own[0] and theirs[1] <= own[1]


def _significantly_better(other: EvaluatedModel, model: EvaluatedModel, loss: Loss) -> bool:
    return other is not model and difference(model, other, loss).low > 0


def _read(run: str | Path | Report) -> tuple[Path, Report]:
    """The place of an evaluated model and its report."""
    if isinstance(run, Report):
        return Path(run.quantized.path), run
    return Path(run), read_evaluation(run)


def read_evaluation(path: str | Path) -> Report:
    """The report of an evaluated result. Raises InputError where there is none."""
    return read_report(_report_path(Path(path)))


def _report_path(path: Path) -> Path:
    """The report.json that a path stands for."""
    if path.suffix == ".json" and not path.is_dir():
        return path
    candidates = (path / "evaluation" / JSON_NAME, path / JSON_NAME)
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        try:
            check_directory(path)
        except InputError as error:
            if path.exists() or work_path(path).exists():
                raise
            raise InputError(f"{error}; name results that `grokquant eval` has evaluated") from None
        raise InputError(f"{path}: has no evaluation/{JSON_NAME}; `grokquant eval` writes it")
    return found


def _named(reports: Sequence[tuple[Path, Report]]) -> list[EvaluatedModel]:
    """Models named by the last part of their paths; where two share it, by the path as given."""
    short = Counter(name_of(report.quantized) for _, report in reports)
    models = []
    for path, report in reports:
        name = name_of(report.quantized)
        models.append(EvaluatedModel(name if short[name] == 1 else str(path), path, report))
    names = Counter(model.name for model in models)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise InputError(f"{repeated[0]}: is given twice")
    return models


def _check_comparable(model: EvaluatedModel, first: EvaluatedModel) -> None:
    """Raises InputError that names the first thing that two reports must share and do not."""
    for what, own, theirs in _must_agree(model.report, first.report):
        if own != theirs:
            raise InputError(
                f"{model.path}: {what} is {own}, but {theirs} in {first.path}; the two cannot be "
                "compared"
            )
    if model.report.documents.tokens != first.report.documents.tokens:
        raise InputError(
            f"{model.path}: documents.tokens is not that of {first.path}; the two cannot be "
            "compared"
        )


def _must_agree(report: Report, first: Report) -> Iterator[tuple[str, object, object]]:
    """(name, value here, value there) of what two reports must share."""
    for field in type(report.protocol).model_fields:
        if field not in _MAY_DIFFER:
            own = getattr(report.protocol, field)
            yield f"protocol.{field}", own, getattr(first.protocol, field)
    for field in ("family", "parameters"):
        own = getattr(report.reference, field)
        yield f"reference.{field}", own, getattr(first.reference, field)
    own_perplexity = report.perplexity.reference.value
    perplexity = first.perplexity.reference.value
    if not isclose(own_perplexity, perplexity, rel_tol=_SAME_PERPLEXITY):
        yield "the reference’s perplexity", own_perplexity, perplexity
    yield "the number of layers", len(report.layers), len(first.layers)
    yield "bootstrap.unit", report.bootstrap.unit, first.bootstrap.unit
