"""Several evaluated models side by side: who is closest to the reference, and at what size.

Two models of one protocol saw the same documents, so their differences are drawn in pairs: far
narrower than their own intervals, which share what is hard about the text.
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
from grokquant.reporting.rows import name_of
from grokquant.version import __version__

SCHEMA = "grokquant.comparison/1"
Figure = Literal["kld", "nll"]
Place = Literal["front", "tied", "behind"]
# What a protocol may differ in: the name of a text says less than its checksum.
_FREE = {"text"}
# The reference's perplexity on the same tokens tells it from others; devices differ by less.
_SAME_PERPLEXITY = 1e-5


@dataclass(frozen=True)
class Run:
    """An evaluated model, under a name that is its own here."""

    name: str
    path: Path
    report: Report

    @property
    def bits_per_weight(self) -> float:
        return self.report.quantized.bits_per_weight


@dataclass(frozen=True)
class Standing:
    """Where a run stands by a figure over bits per weight.

    On the front no other run is better without being larger, or smaller without being worse. A run
    is `tied` if the runs that keep it off the front are better by no more than chance, at 95 %;
    else it is `behind`, and `beaten_by` names the best of those that are surely better.
    """

    place: Place
    beaten_by: str | None = None


@dataclass(frozen=True)
class Contest:
    """Runs of one protocol and reference, the lowest mean KLD first.

    `ranks` count from 1 the runs that are better by more than chance, so ties share theirs;
    `kld` and `perplexity` are the standings, all in the order of `runs`.
    """

    runs: tuple[Run, ...]
    ranks: tuple[int, ...]
    kld: tuple[Standing, ...]
    perplexity: tuple[Standing, ...]

    def as_dict(self) -> dict[str, Any]:
        """The content of `grokquant compare --json`, all of it taken from the reports."""
        first = self.runs[0].report
        return {
            "schema": SCHEMA,
            "grokquant": __version__,
            "reference": first.reference.model_dump(mode="json"),
            "protocol": first.protocol.model_dump(mode="json"),
            "noise_floor": first.noise_floor.model_dump(mode="json"),
            "runs": [
                _run_dict(*row)
                for row in zip(self.runs, self.ranks, self.kld, self.perplexity, strict=True)
            ],
        }


def contest(paths: Sequence[str | Path]) -> Contest:
    """Reads the reports of all `paths` (results, their evaluation directories, or report.json).

    Raises InputError where there is no report, or where two cannot be compared.
    """
    runs = _named([(Path(path), read_report(_report_path(Path(path)))) for path in paths])
    for run in runs[1:]:
        _check_comparable(run, runs[0])
    runs.sort(key=lambda run: run.report.kld.mean.value)
    better = {run.name: sum(_surely_better(other, run, "kld") for other in runs) for run in runs}
    return Contest(
        runs=tuple(runs),
        ranks=tuple(1 + better[run.name] for run in runs),
        kld=tuple(standings(runs, "kld")),
        perplexity=tuple(standings(runs, "nll")),
    )


def difference(run: Run, other: Run, figure: Figure) -> Estimate:
    """The mean of `figure` over tokens, `run` minus `other`, documents drawn again in pairs."""
    tokens = run.report.documents.tokens
    own, theirs = (getattr(r.report.documents, figure) for r in (run, other))
    sums = np.stack([np.array(column, dtype=np.float64) for column in (tokens, own, theirs)], -1)
    drawn = Resampler(sums, run.report.bootstrap.resamples, run.report.bootstrap.seed)
    return drawn.estimate(lambda s: (s[..., 1] - s[..., 2]) / s[..., 0])


def standings(runs: Sequence[Run], figure: Figure) -> Iterator[Standing]:
    """Where each run stands by `figure`, lower being better."""
    for run in runs:
        ahead = sorted(
            (other for other in runs if _dominates(other, run, figure)),
            key=lambda other: _mean(other, figure),
        )
        surely = next((other for other in ahead if _surely_better(other, run, figure)), None)
        if surely:
            yield Standing("behind", surely.name)
        else:
            yield Standing("tied" if ahead else "front")


def _mean(run: Run, figure: Figure) -> float:
    documents = run.report.documents
    return sum(getattr(documents, figure)) / sum(documents.tokens)


def _dominates(other: Run, run: Run, figure: Figure) -> bool:
    theirs, own = ((r.bits_per_weight, _mean(r, figure)) for r in (other, run))
    return theirs != own and theirs[0] <= own[0] and theirs[1] <= own[1]


def _surely_better(other: Run, run: Run, figure: Figure) -> bool:
    return other is not run and difference(run, other, figure).low > 0


def _report_path(path: Path) -> Path:
    """The report.json that a path means."""
    places = (path / "evaluation" / JSON_NAME, path / JSON_NAME)
    found = next((place for place in places if place.is_file()), path)
    if found.is_dir():
        raise InputError(
            f"{path}: has no evaluation/{JSON_NAME}; `grokquant eval {path} --reference ...` "
            "makes it"
        )
    return found


def _named(reports: Sequence[tuple[Path, Report]]) -> list[Run]:
    """Runs under the last part of their models' paths; where two share it, under what was given."""
    short = Counter(name_of(report.quantized) for _, report in reports)
    runs = []
    for path, report in reports:
        name = name_of(report.quantized)
        runs.append(Run(name if short[name] == 1 else str(path), path, report))
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise InputError(f"{twice[0]}: is given twice")
    return runs


def _check_comparable(run: Run, first: Run) -> None:
    """Raises InputError that names the first thing in which two reports are of different kinds."""
    for what, own, theirs in _kinds(run.report, first.report):
        if own != theirs:
            raise InputError(
                f"{run.path}: {what} is {own}, of {first.path} it is {theirs}: such numbers cannot "
                "be compared"
            )


def _kinds(report: Report, first: Report) -> Iterator[tuple[str, object, object]]:
    for field in type(report.protocol).model_fields:
        if field not in _FREE:
            protocols = report.protocol, first.protocol
            yield f"protocol.{field}", *(getattr(protocol, field) for protocol in protocols)
    for field in ("family", "parameters"):
        yield (
            f"reference.{field}",
            getattr(report.reference, field),
            getattr(first.reference, field),
        )
    own, theirs = (r.perplexity.reference.value for r in (report, first))
    if not isclose(own, theirs, rel_tol=_SAME_PERPLEXITY):
        yield "the reference’s perplexity", own, theirs
    yield "bootstrap.unit", report.bootstrap.unit, first.bootstrap.unit
    if report.documents.tokens != first.documents.tokens:
        yield "documents.tokens", "of other documents", "another"


def _run_dict(run: Run, rank: int, kld: Standing, perplexity: Standing) -> dict[str, Any]:
    report, layers = run.report, run.report.layers
    return {
        "name": run.name,
        "path": str(run.path),
        "bits_per_weight": run.bits_per_weight,
        "bytes": report.quantized.bytes,
        "kld": report.kld.mean.model_dump(mode="json"),
        "perplexity": report.perplexity.quantized.model_dump(mode="json"),
        "perplexity_ratio": report.perplexity.ratio.model_dump(mode="json"),
        "same_top_p": report.same_top_p.model_dump(mode="json"),
        "rank": rank,
        "kld_standing": vars(kld),
        "perplexity_standing": vars(perplexity),
        "layers": [
            {
                "layer": layer.layer,
                "relative_error": layer.relative_error,
                "router_top1": layer.router_top1,
                "router_set": layer.router_set,
                "router_set_forced": layer.forced.router_set if layer.forced else None,
            }
            for layer in layers
        ],
    }
