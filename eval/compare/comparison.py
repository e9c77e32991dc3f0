"""The rows of a comparison as a table."""

from collections.abc import Iterable

_HEADS = {
    "grid": False,
    "made by": False,
    "bits per weight": True,
    "mean KLD": True,
    "99 % KLD": True,
    "same top, %": True,
    "router, % by layer": True,
    "mean KLD minus the first’s": True,
    "CPU s": True,
    "GB": True,
}


def table(rows: Iterable[dict]) -> str:
    """Rows as `compare.py` prints them, in Markdown."""
    aligned = ["--:" if numeric else "---" for numeric in _HEADS.values()]
    lines = [_HEADS, aligned, *map(_cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: dict) -> tuple[str, ...]:
    shares = (f"{100 * share:.2f}" for share in row["router_set"] if share is not None)
    return (
        row["line"],
        f"{row['entrant']} {row['version']}",
        f"{row['bits_per_weight']:.3f}",
        f"{row['kld']:.6f} ± {row['kld_error']:.6f}",
        f"{row['kld_99']:.5f}",
        f"{100 * row['same_top']:.2f}",
        ", ".join(shares),
        _difference(*row["behind"]),
        f"{row['cpu_seconds']:.0f}",
        f"{row['peak_rss'] / 1e9:.2f}",
    )


def _difference(value: float, low: float, high: float) -> str:
    """With its 95 % interval; the first row has none."""
    if low == high == 0:
        return "–"
    return f"{value:+.6f} ({low:+.6f} to {high:+.6f})"
