"""Which numbers of a report go into which chart, and the sentences that need counting."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from grokquant.evaluation.report import Layer, Report, Routing, UnitRow
from grokquant.humanize import (
    MINUS,
    NBSP,
    number,
    percent,
    rough,
    short,
    tick_percent,
    unbroken_size,
)
from grokquant.reporting.html.charts import (
    BLUES,
    DIVERGING,
    ORANGES,
    Bar,
    Quantile,
    Series,
    bar_chart,
    heat_map,
    horizontal_bars,
    line_chart,
    quantile_plot,
)
from grokquant.reporting.html.svg import Mark, mark_of
from grokquant.reporting.json_pointer import datum_at, find_datum
from grokquant.reporting.rows import KLD_QUANTILES, QUANTILES, bf16_bytes, name_of

_NAMED_SHARES = {"maximum": 1.0, "median": 0.5, "minimum": 0.0}


def kld_quantiles(report: Report) -> str:
    """KLD over the share of tokens, on a logarithmic axis, with the mean and the noise floor."""
    return quantile_plot(
        "Share of tokens below a KL divergence",
        _quantiles(report, "/kld", KLD_QUANTILES),
        short,
        "KLD in nats, logarithmic",
        [("mean", report.kld.mean.value), ("noise floor", report.noise_floor.mean_kld)],
        log_x=True,
    )


def delta_p_quantiles(report: Report) -> str:
    return quantile_plot(
        "Share of tokens below a change in the probability of the true token",
        _quantiles(report, "/delta_p", QUANTILES),
        percent,
        "Δp: quantized minus reference",
    )


def _quantiles(report: Report, pointer: str, names: Iterable[str]) -> list[Quantile]:
    """The quantiles below `pointer`, the smallest first."""
    quantiles = []
    for name in names:
        found = datum_at(report, f"{pointer}/{name}")
        quantiles.append(Quantile(name, _share(name), Mark(found.value, found)))
    return quantiles[::-1]


def _share(quantile: str) -> float:
    if quantile in _NAMED_SHARES:
        return _NAMED_SHARES[quantile]
    return float(quantile.removesuffix("%")) / 100


def layer_errors(report: Report) -> str:
    marks = _layer_marks(report, "relative_error")
    title = "Relative error of the hidden state after each layer"
    return bar_chart(title, marks, percent, tick_percent, "layer")


def isolated_errors(report: Report) -> str:
    """Errors of each layer and its parts on the reference's own states."""
    parts = {"experts_error": "experts", "attention_error": "attention", "block_error": "block"}
    lines = []
    for field, name in parts.items():
        marks = _layer_marks(report, f"forced/{field}")
        values = [mark.value for mark in marks if mark]
        if values:
            lines.append(Series(name if any(values) else f"{name}: 0 throughout", marks))
    title = "Relative error of the outputs of each layer in isolation"
    return line_chart(title, lines, tick_percent, "layer", log_y=True)


def router_agreement(report: Report) -> str:
    """On the model's own path, and with the reference's states going in."""
    fields = {"router_set": "on its own path", "forced/router_set": "this layer in isolation"}
    lines = [Series(name, _layer_marks(report, field)) for field, name in fields.items()]
    measured = [line for line in lines if any(line.marks)]
    return line_chart("Router agreement by layer", measured, tick_percent, "layer")


def load_shifts(report: Report) -> str:
    marks = _layer_marks(report, "load_shift")
    return bar_chart("Load shift by layer", marks, percent, tick_percent, "layer")


def _layer_marks(report: Report, field: str) -> list[Mark | None]:
    """A field of every layer; "forced/x" is one of the layer in isolation."""
    layers = range(len(report.layers))
    return [mark_of(find_datum(report, f"/layers/{i}/{field}")) for i in layers]


def changed_routes(report: Report) -> str:
    """Mean KLD of the tokens whose routing changed, of the others, and of all."""
    bars = [
        _kld_bar(report, "different experts in some layer", "/routing/changed/mean_kld"),
        _kld_bar(report, "the same experts in all layers", "/routing/unchanged/mean_kld"),
        _kld_bar(report, "all tokens", "/kld/mean/value"),
    ]
    return horizontal_bars("Mean KLD by change of routing", bars)


def _kld_bar(report: Report, name: str, pointer: str) -> Bar:
    found = find_datum(report, pointer)
    if found is None:
        return Bar(name, Mark(0.0), "no tokens")
    return Bar(name, Mark(found.value, found), f"{number(found.value)}{NBSP}nats")


def first_changes(report: Report, routing: Routing) -> str:
    """Mean KLD over the layer in which a token's routing changes first."""
    marks = []
    for i, group in enumerate(routing.first_change):
        found = find_datum(report, f"/routing/first_change/{i}/mean_kld")
        marks.append(Mark(found.value, found, _tokens(group.tokens)) if found else None)
    layers = [group.layer for group in routing.first_change]
    title = "Mean KLD by the layer of the first change of routing"
    return bar_chart(title, marks, rough, short, "layer of the first change", layers)


def damage_map(report: Report) -> str:
    """Each expert's share of the damage of its layer."""
    columns = []
    for i, layer in enumerate(report.layers):
        experts = range(len(layer.forced.damage) if layer.forced else 0)
        pointers = [f"/layers/{i}/forced/damage/{e}" for e in experts]
        columns.append([mark_of(datum_at(report, pointer)) for pointer in pointers])
    return heat_map("Share of the damage by layer and expert", columns, _one_decimal, ORANGES)


def load_map(report: Report) -> str:
    """Tokens of each expert as a share of those of its layer."""
    columns = [_loads(report, i) for i in range(len(report.layers))]
    return heat_map("Share of tokens by layer and expert", columns, _one_decimal, BLUES)


def _loads(report: Report, i: int) -> list[Mark]:
    layer = report.layers[i]
    total = max(sum(layer.tokens_per_expert), 1)
    marks = []
    for e in range(len(layer.tokens_per_expert)):
        tokens = datum_at(report, f"/layers/{i}/tokens_per_expert/{e}")
        marks.append(Mark(tokens.value / total, tokens, _tokens(tokens.value)))
    return marks


def shift_map(report: Report) -> str:
    """Tokens that each expert gained or lost."""
    columns = [[Mark(shift) for shift in _shifts(layer)] for layer in report.layers]
    return heat_map("Tokens gained or lost by layer and expert", columns, _signed, DIVERGING)


def expert_error_map(units: Sequence[UnitRow], field: str) -> str | None:
    """Mean `field` (an error of matrices) of each expert, or None where no experts have it."""
    columns = _by_expert(units, field)
    if columns is None:
        return None
    return heat_map("Error by layer and expert", columns, _three_digits, ORANGES)


def expert_bits_map(units: Sequence[UnitRow]) -> str | None:
    """Mean bits per weight of each expert, or None where there are no experts."""
    columns = _by_expert(units, "bits_per_weight")
    if columns is None:
        return None
    return heat_map("Bits per weight by layer and expert", columns, _two_decimals, BLUES)


def kind_bits_map(units: Sequence[UnitRow]) -> str | None:
    """Mean bits per weight of each kind of matrix in each layer; None without layers."""
    values: dict[tuple[int, str], list[float]] = defaultdict(list)
    for unit in units:
        if unit.layer is not None:
            values[unit.layer, unit.name.rpartition(".")[2]].append(unit.bits_per_weight)
    kinds = list(dict.fromkeys(kind for _, kind in values))
    if not kinds:
        return None
    layers = range(1 + max(layer for layer, _ in values))
    columns = [[_mean_mark(values.get((layer, kind))) for kind in kinds] for layer in layers]
    title = "Bits per weight by layer and kind of matrix"
    return heat_map(title, columns, _two_decimals, BLUES, ("layer", "kind"), kinds)


def _by_expert(units: Sequence[UnitRow], field: str) -> list[list[Mark | None]] | None:
    """Mean `field` of the matrices of each expert: a column per layer; None without experts."""
    values: dict[tuple[int, int], list[float]] = defaultdict(list)
    for unit in units:
        value = getattr(unit, field)
        if unit.layer is not None and unit.expert is not None and value is not None:
            values[unit.layer, unit.expert].append(value)
    experts = {expert for _, expert in values}
    if len(experts) < 2:
        return None
    layers = range(1 + max(layer for layer, _ in values))
    return [[_mean_mark(values.get((i, e))) for e in range(1 + max(experts))] for i in layers]


def _mean_mark(values: list[float] | None) -> Mark | None:
    return Mark(sum(values) / len(values)) if values else None


def sizes(report: Report) -> str:
    model = report.quantized
    reference = report.reference
    bf16 = bf16_bytes(model)
    own = datum_at(report, "/quantized/bytes")
    theirs = datum_at(report, "/reference/bytes")
    bars = [
        Bar(name_of(model), Mark(own.value, own), unbroken_size(model.bytes)),
        Bar(name_of(reference), Mark(theirs.value, theirs), unbroken_size(reference.bytes)),
        Bar("the same weights in bf16", Mark(bf16), unbroken_size(bf16)),
    ]
    return horizontal_bars("Size of all weight files", bars)


def fewest_tokens(report: Report) -> str:
    """Which expert gets the fewest tokens, and what a uniform load would be."""
    tokens, layer, expert = min(
        (tokens, layer.layer, expert)
        for layer in report.layers
        for expert, tokens in enumerate(layer.tokens_per_expert)
    )
    return (
        f"A uniform load would be {_uniform_share(report)}. Fewest tokens: {tokens:,}, for expert "
        f"{expert} in layer {layer}."
    )


def net_movement(report: Report) -> str:
    """Net movement of tokens between experts over all layers."""
    net = sum(abs(shift) for layer in report.layers for shift in _shifts(layer)) // 2
    total = sum(sum(layer.reference_tokens_per_expert) for layer in report.layers)
    return f"Net movement: {net:,} of {total:,} tokens ({percent(net / max(total, 1))})."


def most_damage(report: Report) -> str:
    """Which expert does most of the damage of its layer, and what uniform shares would be."""
    share, layer, expert = max(
        (share, layer.layer, expert)
        for layer in report.layers
        for expert, share in enumerate(layer.forced.damage if layer.forced else ())
    )
    return (
        f"Uniform shares would be {_uniform_share(report)}. Largest: {percent(share, 3)}, for "
        f"expert {expert} in layer {layer}."
    )


def _uniform_share(report: Report) -> str:
    return percent(1 / max(len(layer.tokens_per_expert) for layer in report.layers), 3)


def _shifts(layer: Layer) -> list[int]:
    pairs = zip(layer.tokens_per_expert, layer.reference_tokens_per_expert, strict=True)
    return [own - theirs for own, theirs in pairs]


def _tokens(count: float) -> str:
    return f", {count:,.0f} tokens"


def _three_digits(share: float) -> str:
    return percent(share, 3)


def _two_decimals(bits: float) -> str:
    return f"{bits:.2f}"


def _one_decimal(share: float) -> str:
    return f"{share * 100:.1f}{NBSP}%"


def _signed(shift: float) -> str:
    return f"{shift:+,.0f}".replace("-", MINUS) if shift else "0"
