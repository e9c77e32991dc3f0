"""A ranking as a page: one file, no script, in the look of the report."""

from dataclasses import dataclass, replace
from pathlib import Path

from grokquant.escaping import html_text
from grokquant.evaluation.report import Report
from grokquant.humanize import (
    NBSP,
    number,
    percent,
    rough,
    short,
    tick_percent,
    unbroken_size,
)
from grokquant.reporting.html.charts import Series
from grokquant.reporting.html.markup import (
    better,
    contents,
    document,
    estimate_at,
    facts,
    figure,
    file_path,
    grid,
    number_at,
    section,
    wide_table,
)
from grokquant.reporting.html.page import write_page
from grokquant.reporting.html.ranking_charts import (
    Line,
    Point,
    legend_key,
    lines_by_layer,
    scatter,
)
from grokquant.reporting.html.svg import Mark, mark_of
from grokquant.reporting.json_pointer import datum_at, find_datum
from grokquant.reporting.ranking import RankedModel, Ranking, Standing
from grokquant.reporting.rows import HIGHER, LOWER, NEAR_ONE, name_of
from grokquant.version import __version__

JSON_NAME = "compare.json"
HTML_NAME = "compare.html"
# Losses whose largest is more than this times the smallest get a logarithmic axis: on a linear one
# the smaller ones would lie on each other at the foot.
_FAR_APART = 5
# Sentences list no more models than this.
_MOST_NAMES = 4


@dataclass(frozen=True)
class _Model:
    """A model of the page: its `number`, by size from 0, decides its colour and shape; `pointer` is
    that of its part of the JSON file."""

    ranked: RankedModel
    number: int
    pointer: str


def render_ranking(ranking: Ranking) -> str:
    """The whole page. Numbers carry their pointer into `ranking.as_dict()`."""
    reference = name_of(ranking.report.reference)
    content = ranking.as_dict()
    models = _by_size(ranking)
    header = (
        '<header><p class="eyebrow">Quality and size</p>'
        f"<h1>{len(models)} models against {html_text(reference)}</h1>"
        f'<p class="verdict">{html_text(_verdict(ranking))}</p></header>\n'
    )
    sections = (
        _size_section(content, models)
        + _table(content, models, ranking.report.bootstrap.unit)
        + _routing_section(content, models)
        + _protocol(content, ranking.report)
    )
    body = header + contents(sections) + sections
    return document(f"Comparison with {reference}", body, __version__, JSON_NAME)


def write_ranking(ranking: Ranking, directory: Path) -> tuple[Path, Path]:
    """Writes `compare.json` and `compare.html` into `directory`, each whole or not at all.

    Returns both paths. Raises InputError where the directory cannot be written.
    """
    page = (HTML_NAME, render_ranking(ranking))
    return write_page(directory, (JSON_NAME, ranking.as_dict()), page)


def side_by_side(ranking: Ranking) -> str:
    """The verdict and the table of models."""
    unit = ranking.report.bootstrap.unit
    table = _table(ranking.as_dict(), _by_size(ranking), unit)
    return f'<p class="verdict">{html_text(_verdict(ranking))}</p>{table}'


def kld_against_size(ranking: Ranking) -> str:
    return _kld_figure(ranking.as_dict(), _by_size(ranking))


def perplexity_against_size(ranking: Ranking) -> str:
    return _perplexity_figure(ranking.as_dict(), _by_size(ranking))


def routing_by_layer(ranking: Ranking) -> str:
    """The agreement of the routers; nothing for dense models."""
    return _routing_section(ranking.as_dict(), _by_size(ranking))


def _by_size(ranking: Ranking) -> list[_Model]:
    """The models, the smallest first."""
    places = sorted(enumerate(ranking.models), key=lambda pair: pair[1].bits_per_weight)
    return [_Model(model, number, f"/runs/{i}") for number, (i, model) in enumerate(places)]


def _verdict(ranking: Ranking) -> str:
    """Which model is closest, and which are worth their size."""
    first = ranking.models[0]
    ties = [model.name for model in ranking.models if model.rank == 1]
    if len(ties) > 1:
        closest = f"{_listed(ties)} are closest to the reference, with no significant difference"
    else:
        closest = (
            f"{first.name} is closest to the reference, with a mean KL divergence of "
            f"{rough(first.report.kld.mean.value)}{NBSP}nats at {first.bits_per_weight:.2f} bits "
            "per weight"
        )
    front = [model.name for model in ranking.models if model.kld.status == "front"]
    many = len(front) > _MOST_NAMES
    names = f"{len(front)} of all {len(ranking.models)}" if many else _listed(front)
    return f"{closest}. On the Pareto front, where no model is both smaller and closer: {names}."


def _listed(names: list[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _table(content: dict, models: list[_Model], unit: str) -> str:
    """A row for each model, the smallest first."""
    routed = any(_worst_layer(model.ranked) is not None for model in models)
    heads = [
        ("Model", ""),
        ("Rank", LOWER),
        ("Bits per weight", LOWER),
        ("Size", LOWER),
        ("Mean KLD, nats", LOWER),
        ("Perplexity ratio", NEAR_ONE),
        ("Same top token", HIGHER),
        *([("Same experts, worst layer", HIGHER)] if routed else []),
        ("Pareto front (KLD)", ""),
    ]
    names = [f"{name}<br>{better(way)}" if way else name for name, way in heads]
    rows = [_row(content, model, routed) for model in models]
    return section(
        "Side by side",
        f"Below each value: its 95{NBSP}% confidence interval, from a bootstrap over {unit}s. "
        "“tied”: the difference is within noise. “behind”: significantly worse than a model of the "
        "same size or smaller.",
        wide_table(names, rows, in_words=1),
    )


def _row(content: dict, model: _Model, routed: bool) -> list[str]:
    pointer = model.pointer
    return [
        _name(model.ranked, legend_key(model.number)),
        number_at(content, f"{pointer}/rank", lambda rank: f"{rank:.0f}"),
        number_at(content, f"{pointer}/bits_per_weight", lambda bits: f"{bits:.2f}"),
        number_at(content, f"{pointer}/bytes", lambda stored: unbroken_size(int(stored))),
        estimate_at(content, f"{pointer}/kld"),
        estimate_at(content, f"{pointer}/perplexity_ratio"),
        estimate_at(content, f"{pointer}/same_top_p", "%"),
        *([_worst_agreement(content, model)] if routed else []),
        _standing(model.ranked.kld),
    ]


def _name(model: RankedModel, key: str) -> str:
    """The name of a model above its grid, method and format."""
    how = html_text(f"{model.grid}, {model.format}")
    return f'<span class="run">{key}{html_text(model.name)}</span><span class="ends">{how}</span>'


def _worst_layer(model: RankedModel) -> int | None:
    """Index of the layer whose routers agree least; None for a dense model."""
    agreements = [
        (layer.router_set, i)
        for i, layer in enumerate(model.report.layers)
        if layer.router_set is not None
    ]
    return min(agreements)[1] if agreements else None


def _worst_agreement(content: dict, model: _Model) -> str:
    i = _worst_layer(model.ranked)
    if i is None:
        return "–"
    share = number_at(content, f"{model.pointer}/layers/{i}/router_set", _bare_percent, "%")
    layer = model.ranked.report.layers[i].layer
    return f'<b>{share}</b>{NBSP}%<br><span class="ends">layer {layer}</span>'


def _bare_percent(share: float) -> str:
    return percent(share, 4).removesuffix(f"{NBSP}%")


def _standing(standing: Standing) -> str:
    if standing.status == "behind":
        return f"behind {html_text(standing.beaten_by or '')}"
    return "<b>on the front</b>" if standing.status == "front" else "tied with the front"


def _size_section(content: dict, models: list[_Model]) -> str:
    return section(
        "Quality against size",
        "Errors are correlated, since all models read the same text: two models can differ "
        "significantly even if their intervals overlap.",
        grid((_kld_figure(content, models), _perplexity_figure(content, models))),
    )


def _kld_figure(content: dict, models: list[_Model]) -> str:
    points = [_point(content, model, "kld", model.ranked.kld) for model in models]
    far_apart = _far_apart(points)
    return figure(
        "KL divergence against size",
        _scatter_words(far_apart),
        scatter(
            "Mean KLD against bits per weight", points, short, "bits per weight", "nats", far_apart
        ),
    )


def _perplexity_figure(content: dict, models: list[_Model]) -> str:
    points = [
        _above_one(_point(content, model, "perplexity_ratio", model.ranked.perplexity))
        for model in models
    ]
    far_apart = _far_apart(points)
    return figure(
        "Perplexity against size",
        f"Increase of perplexity over the reference. {_scatter_words(far_apart)}",
        scatter(
            "Increase of perplexity against bits per weight",
            points,
            tick_percent,
            "bits per weight",
            "increase",
            far_apart,
        ),
    )


def _scatter_words(far_apart: bool) -> str:
    words = (
        f"Bars are 95{NBSP}% confidence intervals. The stairs are the Pareto front. Models above "
        "them or to their right are beaten; filled marks lie on the front. Lower left is better. "
        "Models of equal size are drawn side by side."
    )
    return f"{words} The vertical axis is logarithmic." if far_apart else words


def _far_apart(points: list[Point]) -> bool:
    losses = [point.y.value for point in points]
    return min(losses) > 0 and max(losses) > _FAR_APART * min(losses)


def _point(content: dict, model: _Model, field: str, standing: Standing) -> Point:
    """A model by its size and the estimate called `field`."""
    estimate = f"{model.pointer}/{field}"
    value = datum_at(content, f"{estimate}/value")
    return Point(
        name=model.ranked.name,
        model=model.number,
        x=Mark(model.ranked.bits_per_weight),
        y=Mark(value.value, value),
        low=datum_at(content, f"{estimate}/low").value,
        high=datum_at(content, f"{estimate}/high").value,
        on_front=standing.status == "front",
    )


def _above_one(point: Point) -> Point:
    """A ratio drawn as the increase over 1."""
    increase = replace(point.y, value=point.y.value - 1)
    return replace(point, y=increase, low=point.low - 1, high=point.high - 1)


def _routing_section(content: dict, models: list[_Model]) -> str:
    own = _agreements(content, models, "router_set")
    isolated = _agreements(content, models, "router_set_forced")
    if not own:
        return ""
    charts = [
        _routing_figure(
            "On the model’s own path",
            "With the errors of all earlier layers. Higher is better.",
            own,
        )
    ]
    if isolated:
        charts.append(
            _routing_figure(
                "Each layer in isolation",
                "With the reference’s hidden states as input, so that only the layer’s attention "
                "can cause a difference. Higher is better.",
                isolated,
            )
        )
    return section(
        "Routing, layer by layer",
        "Share of tokens that a layer routes to exactly the same experts as the reference.",
        grid(charts),
    )


def _routing_figure(title: str, words: str, lines: list[Line]) -> str:
    drawing = lines_by_layer(f"Router agreement by layer: {title}", lines, tick_percent, "layer")
    return figure(title, words, drawing)


def _agreements(content: dict, models: list[_Model], field: str) -> list[Line]:
    """A line for each model that has routers."""
    lines = []
    for model in models:
        layers = range(len(model.ranked.report.layers))
        pointers = [f"{model.pointer}/layers/{i}/{field}" for i in layers]
        marks = [mark_of(find_datum(content, pointer)) for pointer in pointers]
        if any(marks):
            lines.append(Line(model.number, Series(model.ranked.name, marks)))
    return lines


def _protocol(content: dict, report: Report) -> str:
    protocol = report.protocol
    floor = number_at(content, "/noise_floor/mean_kld", number)
    body = facts(
        (
            ("Text", html_text(protocol.text)),
            ("Samples", protocol.sequences),
            ("Scored", f"{protocol.tokens_scored:,} tokens: {html_text(protocol.scored)}"),
            ("Arithmetic", html_text(protocol.arithmetic)),
            ("Noise floor of the KLD", f"{floor} nats: {html_text(report.noise_floor.how)}"),
            ("Reference", file_path(report.reference.path)),
        )
    )
    words = "All models on the same tokens, against the same reference."
    return section("How it was measured", words, body)
