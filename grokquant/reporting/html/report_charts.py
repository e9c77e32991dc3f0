"""Which numbers of a report go into which plot, and the sentences that need counting."""

import re
from collections import defaultdict

from grokquant.evaluation.report import Layer, Report, Routing
from grokquant.reporting.html.charts import (
    Quantile,
    Series,
    bar_chart,
    heat_map,
    line_chart,
    lying_bars,
    quantile_plot,
)
from grokquant.reporting.html.svg import Mark
from grokquant.reporting.rows import (
    NBSP,
    bf16_bytes,
    name_of,
    number,
    percent,
    quantile_rows,
    rough,
    short,
    size,
)

_EXPERT_UNIT = re.compile(r"layers\.(\d+)\.experts\.(\d+)\.")
_SHARES = {"maximum": 1.0, "median": 0.5, "minimum": 0.0}


def kld_quantiles(report: Report) -> str:
    """KLD over the share of tokens, on a logarithm, with the mean and the noise floor."""
    markers = [("mean", report.kld.mean.value), ("noise floor", report.noise_floor.mean_kld)]
    return quantile_plot(
        "Share of tokens below a KL divergence",
        _quantiles("kld", {name: nats for name, nats, _ in quantile_rows(report)}),
        short,
        "KLD in nats, logarithmic",
        markers,
        log_x=True,
    )


def delta_p_quantiles(report: Report) -> str:
    return quantile_plot(
        "Share of tokens below a change in the probability of the true token",
        _quantiles("delta_p", {name: share for name, _, share in quantile_rows(report)}),
        percent,
        "Δp: quantized minus reference",
    )


def _quantiles(part: str, values: dict[str, float | None]) -> list[Quantile]:
    return [
        Quantile(name, _share(name), Mark(value, f"/{part}/{name}"))
        for name, value in reversed(values.items())
        if value is not None
    ]


def _share(name: str) -> float:
    return _SHARES[name] if name in _SHARES else float(name.removesuffix("%")) / 100


def layer_errors(report: Report) -> str:
    marks = [
        Mark(layer.relative_error, f"/layers/{i}/relative_error")
        for i, layer in enumerate(report.layers)
    ]
    title = "Relative error of the hidden state after each layer"
    return bar_chart(title, marks, percent, _plain_percent, "layer")


def errors_alone(report: Report) -> str:
    """Errors of each layer and its parts on the reference's own states."""
    keys = {"experts_error": "experts", "attention_error": "attention", "block_error": "block"}
    drawn = []
    for key, name in keys.items():
        marks = _layer_marks(report, f"forced.{key}")
        values = [mark.value for mark in marks if mark]
        if values:
            drawn.append(Series(name if any(values) else f"{name}: 0 throughout", marks))
    title = "Relative error of the outputs of each layer alone"
    return line_chart(title, drawn, _plain_percent, "layer", log_y=True)


def router_agreement(report: Report) -> str:
    """On the model's own path, and with the reference's states going in."""
    keys = {"router_set": "on its own path", "forced.router_set": "this layer alone"}
    series = [Series(name, _layer_marks(report, key)) for key, name in keys.items()]
    drawn = [line for line in series if any(line.marks)]
    return line_chart("Router agreement by layer", drawn, _plain_percent, "layer")


def load_shifts(report: Report) -> str:
    marks = _layer_marks(report, "load_shift")
    return bar_chart("Load shift by layer", marks, percent, _plain_percent, "layer")


def changed_routes(report: Report, routing: Routing) -> str:
    """Mean KLD of the tokens whose routing changed, and of the others."""
    groups = {"changed": "another expert somewhere", "unchanged": "the same experts throughout"}
    bars = []
    for key, name in groups.items():
        group = getattr(routing, key)
        label = "no tokens" if group.mean_kld is None else f"{number(group.mean_kld)}{NBSP}nats"
        mark = Mark(group.mean_kld or 0.0, f"/routing/{key}/mean_kld" * (group.tokens > 0))
        bars.append((f"{name}", mark, label))
    bars.append(("all tokens", Mark(report.kld.mean.value, "/kld/mean/value"),
                 f"{number(report.kld.mean.value)}{NBSP}nats"))  # fmt: skip
    return lying_bars("Mean KLD by change of routing", bars)


def first_changes(routing: Routing) -> str:
    """Mean KLD over the layer in which a token's routing changes first."""
    marks = [
        None if row.mean_kld is None
        else Mark(row.mean_kld, f"/routing/first_change/{i}/mean_kld", None, _tokens(row.tokens))
        for i, row in enumerate(routing.first_change)
    ]  # fmt: skip
    names = [row.layer for row in routing.first_change]
    title = "Mean KLD by the layer of the first change of routing"
    return bar_chart(title, marks, rough, short, "layer of the first change", names)


def damage_map(report: Report) -> str:
    """Each expert's share of the damage of its layer."""
    columns = [
        [
            Mark(share, f"/layers/{i}/forced/damage/{e}")
            for e, share in enumerate(layer.forced.damage if layer.forced else ())
        ]
        for i, layer in enumerate(report.layers)
    ]
    return heat_map("Share of the damage by layer and expert", columns, _load, "e")


def _layer_marks(report: Report, key: str) -> list[Mark | None]:
    values = [_found(layer, key) for layer in report.layers]
    path = key.replace(".", "/")
    return [None if v is None else Mark(v, f"/layers/{i}/{path}") for i, v in enumerate(values)]


def _found(layer: Layer, key: str) -> float | None:
    """A figure of a layer; "forced.x" is one of the layer alone."""
    part, _, name = key.rpartition(".")
    return getattr(layer.forced if part else layer, name, None)


def load_map(report: Report) -> str:
    """Tokens of each expert as a share of those of its layer."""
    columns = [_loads(layer, f"/layers/{i}") for i, layer in enumerate(report.layers)]
    return heat_map("Share of tokens by layer and expert", columns, _load, "q")


def _loads(layer: Layer, path: str) -> list[Mark]:
    total = max(sum(layer.tokens_per_expert), 1)
    return [
        Mark(tokens / total, f"{path}/tokens_per_expert/{e}", tokens, _tokens(tokens))
        for e, tokens in enumerate(layer.tokens_per_expert)
    ]


def shift_map(report: Report) -> str:
    """Tokens that each expert gained or lost."""
    columns = [[Mark(shift) for shift in _shifts(layer)] for layer in report.layers]
    return heat_map("Tokens gained or lost by layer and expert", columns, _signed, "d")


def unit_error_map(report: Report, key: str) -> str | None:
    """Mean `key` (an error of units) of each expert, or None where no experts have it."""
    errors: dict[tuple[int, int], list[float]] = defaultdict(list)
    for unit in report.units:
        found, error = _EXPERT_UNIT.match(unit.name), getattr(unit, key)
        if found and error is not None:
            errors[int(found[1]), int(found[2])].append(error)
    if len({expert for _, expert in errors}) < 2:
        return None
    layers, experts = (1 + max(key[axis] for key in errors) for axis in (0, 1))
    columns = [
        [Mark(sum(values) / len(values)) if (values := errors.get((i, e))) else None
         for e in range(experts)]
        for i in range(layers)
    ]  # fmt: skip
    return heat_map("Error by layer and expert", columns, _three_digits, "e")


def sizes(report: Report) -> str:
    model, reference = report.quantized, report.reference
    bars = [
        (name_of(model), Mark(model.bytes, "/quantized/bytes"), size(model.bytes)),
        (name_of(reference), Mark(reference.bytes, "/reference/bytes"), size(reference.bytes)),
        ("the same as bf16", Mark(bf16_bytes(model)), size(bf16_bytes(model))),
    ]
    return lying_bars("Size of the weight files", bars)


def least_fed(report: Report) -> str:
    """Which expert sees least, and how even loads would look."""
    tokens, layer, expert = min(
        (tokens, layer.layer, expert)
        for layer in report.layers
        for expert, tokens in enumerate(layer.tokens_per_expert)
    )
    even = 1 / max(len(layer.tokens_per_expert) for layer in report.layers)
    return (
        f"Even would be {percent(even, 3)}. Least fed: layer {layer}, expert {expert}, "
        f"with {tokens:,} tokens."
    )


def moved(report: Report) -> str:
    """Net movement between experts over all layers."""
    net = sum(abs(shift) for layer in report.layers for shift in _shifts(layer)) // 2
    total = sum(sum(layer.reference_tokens_per_expert) for layer in report.layers)
    return f"Net of exchanges, {net:,} of {total:,} ({percent(net / max(total, 1))}) moved."


def most_damage(report: Report) -> str:
    """Which expert does most of the damage of its layer, and how even shares would look."""
    share, layer, expert = max(
        (share, layer.layer, expert)
        for layer in report.layers
        for expert, share in enumerate(layer.forced.damage if layer.forced else ())
    )
    even = 1 / max(len(layer.tokens_per_expert) for layer in report.layers)
    return (
        f"Even would be {percent(even, 3)}. Most: {percent(share, 3)} by expert {expert} of "
        f"layer {layer}."
    )


def _shifts(layer: Layer) -> list[int]:
    pairs = zip(layer.tokens_per_expert, layer.reference_tokens_per_expert, strict=True)
    return [own - theirs for own, theirs in pairs]


def _tokens(count: int) -> str:
    return f", {count:,} tokens"


def _three_digits(share: float) -> str:
    return percent(share, 3)


def _load(share: float) -> str:
    return f"{share * 100:.1f}{NBSP}%"


def _plain_percent(share: float) -> str:
    return f"{share * 100:.4g}{NBSP}%"


def _signed(shift: float) -> str:
    return f"{shift:+,.0f}".replace("-", "−") if shift else "0"
