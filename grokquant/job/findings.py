"""What a reader of a run's reports should not miss: matrices of which too much was lost."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from grokquant.grids import Scheme
from grokquant.job.shards import REPORT_NAME
from grokquant.types import UnitReport

# A matrix of zeros has the relative error 1, but for the rounding of the sums.
_NOTHING_LEFT = 0.999
# As many times the usual error of its kind as something that is wrong with a matrix makes of it.
_UNUSUAL = 2.0
# Matrices that make an error the usual one.
_FEWEST = 3
_LISTED = 10


def findings(
    reports: Sequence[UnitReport],
    kinds: Mapping[str, str],
    grid_name: Callable[[Scheme], str] = str,
) -> list[str]:
    """A line for each matrix that lost whole rows, all of its weights, or twice as much as others.

    `kinds` says what each matrix is, such as experts.down, by name. A matrix is compared with
    those of its kind on the same grid, which `grid_name` calls as its users do.
    """
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for report in reports:
        errors[kinds[report.name], grid_name(report.scheme)].append(report.relative_error)
    usual = {key: median(each) for key, each in errors.items() if len(each) >= _FEWEST}
    lines = []
    for report in reports:
        kind = (kinds[report.name], grid_name(report.scheme))
        if found := list(_losses(report, usual.get(kind, 0.0), kind)):
            lines.append(f"{report.name}: {'; '.join(found)}")
    return lines


def listed(lines: Sequence[str]) -> list[str]:
    """The first of many lines, and how many more the report has."""
    more = len(lines) - _LISTED
    rest = [f"and {more} more, see findings in {REPORT_NAME}"] if more > 0 else []
    return [*lines[:_LISTED], *rest]


def _losses(report: UnitReport, usual: float, kind: tuple[str, str]) -> Iterator[str]:
    error = report.relative_error
    if report.lost_rows:
        yield f"{report.lost_rows} rows became zero, too small for {kind[1]}"
    if error >= _NOTHING_LEFT:
        yield f"relative error {error:.3g}, nothing is left of its weights"
    elif usual and error > _UNUSUAL * usual:
        named = " in ".join(kind)
        times = error / usual
        yield f"relative error {error:.3g}, {times:.1f} times the median {usual:.3g} of {named}"
