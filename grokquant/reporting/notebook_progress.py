"""Progress in the output of a notebook's cell: a bar that is updated in place, without widgets.

Outside notebooks the functions of the package print nothing.
"""

import sys
from time import monotonic
from typing import Any

from grokquant.escaping import html_text
from grokquant.evaluation.measure import LayerDone
from grokquant.evaluation.report import Layer
from grokquant.humanize import duration
from grokquant.job.pipeline import Silence
from grokquant.job.plan import Plan
from grokquant.reporting.terminal import error_words
from grokquant.types import UnitReport


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process; IPython in a terminal has none."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython(), "kernel") if ipython else False


class _Bar:
    """`done` of `total` layers, and words beside the bar."""

    def __init__(self, work: str) -> None:
        self.work = work
        self.start = monotonic()
        self.finished = 0  # layers since the start; a resumed run has more
        self.output: Any = None

    def show(self, done: int, total: int, words: str) -> None:
        from IPython.display import HTML, display  # there in a notebook, and nowhere else

        bar = f'<progress max="{total}" value="{done}"></progress>'
        page = HTML(f"<div>{bar} {html_text(f'{self.work}: {words}')}</div>")
        if self.output is None:
            self.output = display(page, display_id=True)
        else:
            self.output.update(page)

    def layer(self, index: int, total: int, words: str) -> None:
        """Layer `index` is done."""
        self.finished += 1
        done = index + 1
        seconds = monotonic() - self.start
        if done == total:
            self.show(done, total, f"{total} layers in {duration(seconds)}")
            return
        left = duration(seconds / self.finished * (total - done))
        self.show(done, total, f"{done} of {total} layers, {words}, {left} left")


class RunBar(Silence):
    """The progress of `quantize`."""

    def planned(self, plan: Plan) -> None:
        self.bar = _Bar(f"quantizing {plan.recipe.output.path}")
        self.total = plan.checkpoint.num_layers
        self.bar.show(0, self.total, f"{self.total} layers")

    def found(self, plan: Plan) -> None:
        total = plan.checkpoint.num_layers
        _Bar(plan.recipe.output.path).show(total, total, "was finished already")

    def layer_done(self, index: int, reports: list[UnitReport], tokens: list[int]) -> None:
        self.bar.layer(index, self.total, error_words(reports))


def run_progress() -> Silence:
    """What `quantize` shows: a bar in a notebook, nothing elsewhere."""
    return RunBar() if in_notebook() else Silence()


def evaluation_progress() -> LayerDone | None:
    """What `evaluate` shows."""
    if not in_notebook():
        return None
    bar = _Bar("evaluating")

    def layer_done(figures: Layer, total: int) -> None:
        bar.layer(figures.layer, total, f"error {figures.relative_error:.4f}")

    return layer_done
