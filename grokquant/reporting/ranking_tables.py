"""A comparison for the terminal and as Markdown: one table of figures, one of routing by layer."""

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from grokquant.evaluation.report import Estimate
from grokquant.reporting.ranking import Contest, Standing
from grokquant.reporting.rows import markdown_cell, name_of, number, percent, size

_COLUMNS = (
    "Model", "Rank", "Bits per weight", "Size", "Mean KLD, nats", "PPL(Q)/PPL(base)", "Same top p",
    "KLD over bits", "PPL over bits",
)  # fmt: skip


def terminal_tables(contest: Contest) -> list[Table]:
    """For a rich console."""
    figures = Table(caption=escape(_basis(contest)), title_justify="left", caption_justify="left")
    for index, column in enumerate(_COLUMNS):
        figures.add_column(column, justify="right" if 0 < index < 7 else "left")
    for row in _rows(contest):
        figures.add_row(*map(escape, row))
    routing = list(_routing(contest))
    if not routing:
        return [figures]
    layers = Table(caption="Tokens that go to the same experts as in the reference, by layer")
    layers.add_column("Layer", justify="right")
    for run in contest.runs:
        layers.add_column(escape(run.name), justify="right")
    for row in routing:
        layers.add_row(*row)
    return [figures, layers]


def markdown(contest: Contest) -> str:
    """The same as text for a README or an issue."""
    aligned = "|".join(("", ":--", *["--:"] * 6, ":--", ":--", ""))
    lines = [
        _line(_COLUMNS),
        aligned,
        *map(_line, _rows(contest)),
        "",
        markdown_cell(_basis(contest)),
    ]
    routing = list(_routing(contest))
    if routing:
        names = [run.name for run in contest.runs]
        aligned = "|".join(("", *["--:"] * (len(names) + 1), ""))
        lines += ["", "Tokens that go to the same experts as in the reference:", ""]
        lines += [_line(["Layer", *names]), aligned, *map(_line, routing)]
    return "\n".join([*lines, ""])


def _rows(contest: Contest) -> Iterator[tuple[str, ...]]:
    for run, rank, kld, perplexity in zip(
        contest.runs, contest.ranks, contest.kld, contest.perplexity, strict=True
    ):
        report = run.report
        yield (
            run.name,
            str(rank),
            f"{run.bits_per_weight:.3f}",
            size(report.quantized.bytes),
            _with_error(report.kld.mean),
            _with_error(report.perplexity.ratio),
            percent(report.same_top_p.value, 4),
            _words(kld),
            _words(perplexity),
        )


def _with_error(estimate: Estimate) -> str:
    error = number(estimate.error, estimate.error)
    return f"{number(estimate.value, estimate.error)} ± {error}"


def _words(standing: Standing) -> str:
    if standing.place == "behind":
        return f"behind {standing.beaten_by}"
    return standing.place


def _routing(contest: Contest) -> Iterator[tuple[str, ...]]:
    for layers in zip(*(run.report.layers for run in contest.runs), strict=True):
        shares = [layer.router_set for layer in layers]
        if any(share is not None for share in shares):
            shown = ("–" if share is None else percent(share, 4) for share in shares)
            yield (str(layers[0].layer), *shown)


def _basis(contest: Contest) -> str:
    report = contest.runs[0].report
    protocol, drawn = report.protocol, report.bootstrap
    noise = number(report.noise_floor.mean_kld)
    return (
        f"{protocol.tokens_scored:,} tokens of {protocol.text}, {protocol.windows:,} windows of "
        f"{protocol.length:,}; reference: {name_of(report.reference)}; ± is a standard error over "
        f"{drawn.clusters:,} {drawn.unit}s; runs that share a rank differ by no more than chance; "
        f"noise floor of the KLD {noise}"
    )


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(map(markdown_cell, cells))} |"
