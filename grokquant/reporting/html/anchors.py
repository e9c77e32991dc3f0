"""A mean KL divergence beside others that were measured: is it much?"""

from grokquant.evaluation.report import Report
from grokquant.humanize import NBSP, rough, short
from grokquant.reporting.html.axis import Axis, ticks
from grokquant.reporting.html.markup import figure
from grokquant.reporting.html.svg import (
    LEFT,
    RIGHT,
    Mark,
    axis_title,
    baseline,
    dot,
    drawing,
    reference_line,
    x_tick,
)
from grokquant.reporting.json_pointer import datum_at

# Mean KLD of the embedded toy after `quantize toy` with the options named and `eval` without any.
ANCHORS = (
    ("--grid q6_k", 0.0013),
    ("--bits 4", 0.0108),
    ("--bits 3 --format gptq", 0.0439),
    ("--bits 2 --format gptq", 0.184),
)
_LINE = 18  # units between two names


def scale_of_divergence(report: Report) -> str:
    """The mean KLD of the report on an axis with the anchors."""
    mean = datum_at(report, "/kld/mean/value")
    if mean.value <= 0:
        return ""
    foot = 14 + _LINE * (len(ANCHORS) + 1)
    values = [mean.value, *(value for _, value in ANCHORS)]
    x = Axis(min(values) / 3, max(values) * 3, LEFT, RIGHT, log=True)
    lines = [
        reference_line(x(value), 12 + _LINE * i, foot, name)
        for i, (name, value) in enumerate(ANCHORS)
    ]
    ends = [x_tick(x(value), foot, short(value)) for value in ticks(x)]
    here = dot(x(mean.value), foot, "s1", Mark(mean.value, mean), f"mean KLD: {rough(mean.value)}")
    title = axis_title(foot + 38, "mean KLD in nats, logarithmic")
    return figure(
        "Is that much?",
        f"The dot is this model, at {rough(mean.value)}{NBSP}nats. The lines are the embedded toy "
        "after `grokquant quantize toy` with the options named; larger models lose less at the "
        "same bits. Further left is better.",
        drawing("Mean KLD among others", foot + 44, [*lines, baseline(foot), *ends, here, title]),
    )
