"""The rows of a comparison as a table: means over draws of calibration sequences and texts."""

from collections.abc import Sequence
from statistics import mean, stdev

_HEADS = {
    "grid": False,
    "made by": False,
    "bits per weight": True,
    "mean KLD": True,
    "of the best peer’s": True,
    "99 % KLD": True,
    "same top, %": True,
    "router, % by layer": True,
    "CPU s": True,
    "GB": True,
}
OWN = "grokquant"


def table(rows: Sequence[dict]) -> str:
    """Rows of one model, as `compare.py` prints them, in Markdown."""
    aligned = ["--:" if numeric else "---" for numeric in _HEADS.values()]
    lines = [list(_HEADS), aligned]
    for line in dict.fromkeys(row["line"] for row in rows):
        lines += _of_line([row for row in rows if row["line"] == line])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _of_line(rows: Sequence[dict]) -> list[list[str]]:
    """A line of cells for each entrant."""
    entrants: dict[str, list[dict]] = {}
    for row in rows:
        entrants.setdefault(row["entrant"], []).append(row)
    peers = [found for entrant, found in entrants.items() if not entrant.startswith(OWN)]
    best = min(peers, key=lambda found: _mean(found, "kld"), default=[])
    return [_cells(found, best) for found in entrants.values()]


def _cells(rows: Sequence[dict], best: Sequence[dict]) -> list[str]:
    layers = zip(*(row["router_set"] for row in rows), strict=True)
    shares = [mean(layer) for layer in layers if None not in layer]
    return [
        rows[0]["line"],
        f"{rows[0]['entrant']} {rows[0]['version']}",
        f"{_mean(rows, 'bits_per_weight'):.3f}",
        f"{_mean(rows, 'kld'):.6f}",
        _share(rows, best),
        f"{_mean(rows, 'kld_99'):.5f}",
        f"{100 * _mean(rows, 'same_top'):.2f}",
        ", ".join(f"{100 * share:.2f}" for share in shares),
        f"{_mean(rows, 'cpu_seconds'):.0f}",
        f"{max(row['peak_rss'] for row in rows) / 1e9:.2f}",
    ]


def _mean(rows: Sequence[dict], key: str) -> float:
    return mean(row[key] for row in rows)


def _share(rows: Sequence[dict], best: Sequence[dict]) -> str:
    """The KL divergence over that of the best peer in the same draw and text, with the standard
    error of the mean."""
    base = {(row["seed"], row["text"]): row["kld"] for row in best}
    places = [((row["seed"], row["text"]), row["kld"]) for row in rows]
    ratios = [kld / base[place] for place, kld in places if place in base]
    if rows is best or not ratios:
        return "1" if ratios else "–"
    return mean_with_error(ratios, 2)


def mean_with_error(values: Sequence[float], digits: int) -> str:
    """The mean and its standard error; `nan` for that of a single value."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean(values):.{digits}f} ± {error:.{digits}f}"
