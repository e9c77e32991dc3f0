"""The comparison as a page: one file, no script, in the look of the report."""

from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path

from grokquant.evaluation.report import Estimate, Layer
from grokquant.reporting.html.charts import Series
from grokquant.reporting.html.markup import (
    better,
    datum,
    document,
    estimate_of,
    figure,
    section,
    wide_table,
)
from grokquant.reporting.html.page import write_page
from grokquant.reporting.html.ranking_charts import Point, key, run_lines, scatter
from grokquant.reporting.html.svg import Mark
from grokquant.reporting.ranking import Contest, Run, Standing
from grokquant.reporting.rows import (
    HIGHER,
    LOWER,
    NBSP,
    NEAR_ONE,
    name_of,
    number,
    percent,
    rough,
    short,
    size,
)
from grokquant.version import __version__

JSON_NAME, HTML_NAME = "compare.json", "compare.html"
# Losses that lie further apart than this are drawn on a logarithm.
_FAR_APART = 5
# Sentences list no more models than this.
_NAMED = 4


def render_comparison(contest: Contest) -> str:
    """The whole page. Numbers carry their place in `contest.as_dict()`."""
    reference = name_of(contest.runs[0].report.reference)
    body = (
        '<header><p class="eyebrow">Quality over size</p>'
        f"<h1>{len(contest.runs)} models against {escape(reference)}</h1>"
        f'<p class="verdict">{escape(_verdict(contest))}</p></header>\n'
        + _size_section(contest)
        + _table(contest)
        + _routing_section(contest)
        + _protocol(contest)
    )
    return document(f"Comparison with {reference}", body, __version__, JSON_NAME)


def write_comparison(contest: Contest, directory: Path) -> tuple[Path, Path]:
    """Writes `compare.json` and `compare.html` into `directory`, each whole or not at all.

    Returns both paths. Raises InputError where the directory cannot be written.
    """
    page = HTML_NAME, render_comparison(contest)
    return write_page(directory, (JSON_NAME, contest.as_dict()), page)


def _by_size(contest: Contest) -> list[int]:
    """Places of the runs in the contest, the smallest model first."""
    runs = contest.runs
    return sorted(range(len(runs)), key=lambda i: (runs[i].bits_per_weight, i))


def _verdict(contest: Contest) -> str:
    """Who is closest, who is worth its size."""
    first = contest.runs[0]
    ties = [run.name for run, rank in zip(contest.runs, contest.ranks, strict=True) if rank == 1]
    closest = (
        f"{_listed(ties)} are equally close to the reference within chance"
        if len(ties) > 1
        else f"{first.name} is closest to the reference, {rough(first.report.kld.mean.value)}"
        f"{NBSP}nats away at {first.bits_per_weight:.2f} bits per weight"
    )
    front = [run.name for run, kld in zip(contest.runs, contest.kld, strict=True)
             if kld.place == "front"]  # fmt: skip
    names = f"{len(front)} of all {len(contest.runs)}" if len(front) > _NAMED else _listed(front)
    verb = "is" if len(front) == 1 else "are"
    return f"{closest}. On the front, where nothing is both smaller and closer, {verb} {names}."


def _listed(names: list[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _table(contest: Contest) -> str:
    """A row for each run, the smallest first."""
    routed = any(_least(run) for run in contest.runs)
    heads = [
        ("Model", ""),
        ("Bits per weight", LOWER),
        ("Size", LOWER),
        ("Mean KLD, nats", LOWER),
        ("Perplexity ratio", NEAR_ONE),
        ("Same top token", HIGHER),
        *([("Same experts, worst layer", HIGHER)] if routed else []),
        ("KLD for its size", ""),
    ]
    names = [f"{name}<br>{better(way)}" if way else name for name, way in heads]
    rows = [_row(contest, i, place, routed) for place, i in enumerate(_by_size(contest))]
    drawn = contest.runs[0].report.bootstrap
    return section(
        "Side by side",
        f"Below the figures: 95{NBSP}% intervals, from drawing the {drawn.unit}s again. “tied” is "
        "beaten by no more than chance, “behind” is beaten surely by a model that is no larger.",
        wide_table(names, rows, last_in_words=True),
    )


def _row(contest: Contest, i: int, place: int, routed: bool) -> list[str]:
    run, path = contest.runs[i], f"/runs/{i}"
    report = run.report
    return [
        f'<span class="run">{key(place)}{escape(run.name)}</span>',
        datum(f"{path}/bits_per_weight", run.bits_per_weight, f"{run.bits_per_weight:.2f}"),
        datum(f"{path}/bytes", report.quantized.bytes, size(report.quantized.bytes)),
        estimate_of(f"{path}/kld", report.kld.mean),
        estimate_of(f"{path}/perplexity_ratio", report.perplexity.ratio),
        estimate_of(f"{path}/same_top_p", report.same_top_p, "%"),
        *([_worst_layer(run, path)] if routed else []),
        _standing(contest.kld[i]),
    ]


def _least(run: Run) -> tuple[float, int] | None:
    """The lowest agreement of the routers of a run, and the place of its layer."""
    found = [(x.router_set, i) for i, x in enumerate(run.report.layers) if x.router_set is not None]
    return min(found, default=None)


def _worst_layer(run: Run, path: str) -> str:
    least = _least(run)
    if least is None:
        return "–"
    share, i = least
    shown = percent(share, 4).removesuffix(f"{NBSP}%")
    value = datum(f"{path}/layers/{i}/router_set", share, shown, "%")
    return f'<b>{value}</b>{NBSP}%<br><span class="ends">layer {run.report.layers[i].layer}</span>'


def _standing(standing: Standing) -> str:
    if standing.place == "behind":
        return f"behind {escape(standing.beaten_by or '')}"
    return "<b>on the front</b>" if standing.place == "front" else "tied with the front"


def _size_section(contest: Contest) -> str:
    kld = _points(contest, contest.kld, "kld", lambda run: run.report.kld.mean)
    rise = [
        replace(
            point,
            y=Mark(point.y.value - 1, point.y.path, point.y.value),
            low=point.low - 1,
            high=point.high - 1,
        )
        for point in _points(
            contest, contest.perplexity, "perplexity_ratio", lambda run: run.report.perplexity.ratio
        )
    ]
    words = (
        f"Bars are 95{NBSP}% intervals. The stairs are the front: what lies above them or to their "
        "right is beaten. Filled marks stand on it. Lower left is better. Models of one size are "
        "drawn side by side."
    )
    log = " The axis of the loss is logarithmic."
    far, wide = _far_apart(kld), _far_apart(rise)
    charts = figure(
        "KL divergence over size",
        words + log * far,
        scatter("Mean KLD over bits per weight", kld, short, "bits per weight", "nats", far),
    ) + figure(
        "Perplexity over size",
        f"How much higher perplexity is than the reference’s. {words}" + log * wide,
        scatter("Rise of perplexity over bits per weight", rise, _plain_percent,
                "bits per weight", "rise", wide),
    )  # fmt: skip
    return section(
        "Quality over size",
        "Intervals share what is hard about the text: two that overlap can still differ surely.",
        f'<div class="grid">{charts}</div>',
    )


def _far_apart(points: list[Point]) -> bool:
    losses = [point.y.value for point in points]
    return min(losses) > 0 and max(losses) > _FAR_APART * min(losses)


def _points(
    contest: Contest,
    standings: tuple[Standing, ...],
    field: str,
    figure_of: Callable[[Run], Estimate],
) -> list[Point]:
    points = []
    for place, i in enumerate(_by_size(contest)):
        run, found = contest.runs[i], figure_of(contest.runs[i])
        x = Mark(run.bits_per_weight)
        y = Mark(found.value, f"/runs/{i}/{field}/value")
        on_front = standings[i].place == "front"
        points.append(Point(run.name, place, x, y, found.low, found.high, on_front))
    return points


def _routing_section(contest: Contest) -> str:
    own = _agreements(contest, "router_set", lambda x: x.router_set)
    alone = _agreements(
        contest, "router_set_forced", lambda x: x.forced.router_set if x.forced else None
    )
    if not own:
        return ""
    kinds = {
        "On their own paths": (own, "With the errors of all layers before. Higher is better."),
        "Each layer alone": (
            alone,
            "On the reference’s states, so that only the layer’s attention can be the cause. "
            "Higher is better.",
        ),
    }
    charts = "".join(
        figure(
            title,
            words,
            run_lines(
                f"Router agreement by layer: {title}",
                [line for line, _ in found],
                [place for _, place in found],
                _plain_percent,
                "layer",
            ),
        )
        for title, (found, words) in kinds.items()
        if found
    )
    return section(
        "Routing, layer by layer",
        "Share of tokens that a layer sends to exactly the experts that the reference chose.",
        f'<div class="grid">{charts}</div>',
    )


def _agreements(
    contest: Contest, field: str, found: Callable[[Layer], float | None]
) -> list[tuple[Series, int]]:
    """The lines of the runs that have routers, with their places."""
    lines = []
    for place, i in enumerate(_by_size(contest)):
        run = contest.runs[i]
        marks = [
            None if (share := found(layer)) is None
            else Mark(share, f"/runs/{i}/layers/{j}/{field}")
            for j, layer in enumerate(run.report.layers)
        ]  # fmt: skip
        if any(marks):
            lines.append((Series(run.name, marks), place))
    return lines


def _plain_percent(share: float) -> str:
    return f"{share * 100:.4g}{NBSP}%"


def _protocol(contest: Contest) -> str:
    report = contest.runs[0].report
    protocol, noise = report.protocol, report.noise_floor.mean_kld
    floor = datum("/noise_floor/mean_kld", noise, number(noise))
    facts = (
        ("Text", escape(protocol.text)),
        ("Windows", f"{protocol.windows:,}, of {protocol.length:,} tokens each"),
        ("Scored", f"{protocol.tokens_scored:,} tokens: {escape(protocol.scored)}"),
        ("Arithmetic", escape(protocol.arithmetic)),
        ("Noise floor of the KLD", f"{floor} nats: {escape(report.noise_floor.how)}"),
        ("Reference", f'<span class="path">{escape(report.reference.path)}</span>'),
    )
    listed = "".join(f"<dt>{name}</dt><dd>{fact}</dd>" for name, fact in facts)
    return section(
        "How it was measured",
        "All of them on the same tokens, against the same reference.",
        f'<div class="card"><dl class="facts">{listed}</dl></div>',
    )
