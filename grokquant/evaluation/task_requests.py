"""The requests of a suite's tasks, and the results from the answers. lm-eval is imported only if
there are tasks."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.evaluation.items import ItemResults, paired_items, task_rows
from grokquant.evaluation.likelihoods import Batch, Likelihood, Pair, pack
from grokquant.evaluation.report import Tasks
from grokquant.evaluation.suite import Suite
from grokquant.parallel import ALONE, Team
from grokquant.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from grokquant.evaluation.lm_tasks import LmTasks, Prompt

Results = tuple[Tasks | None, list[ItemResults]]


@dataclass
class NoTasks:
    """The tasks of a suite that has none."""

    batches: list[Batch] = field(default_factory=list)

    def results(self, own: dict[Pair, Likelihood], base: dict[Pair, Likelihood]) -> Results:
        return None, []


@dataclass
class OpenedTasks:
    """`batches` hold the requests to both models; `texts` are what both have generated, the
    quantized model's first."""

    tasks: "LmTasks"
    batches: list[Batch]
    texts: "tuple[dict[Prompt, str], dict[Prompt, str]]"

    def results(self, own: dict[Pair, Likelihood], base: dict[Pair, Likelihood]) -> Results:
        """The tasks for the report and their items, from the answers of both models."""
        from grokquant.evaluation import lm_tasks

        quantized = self.tasks.scores(own, self.texts[0])
        reference = self.tasks.scores(base, self.texts[1])
        items = list(paired_items(quantized, reference))
        rows = Tasks(
            lm_eval=lm_tasks.LM_EVAL_VERSION,
            max_length=self.tasks.longest,
            prefix_token=lm_tasks.prefix_token(self.tasks.tokenizer),
            tasks=task_rows(quantized, reference, items),
        )
        return rows, items


@contextmanager
def opened_tasks(
    suite: Suite, candidate: Checkpoint, base: Checkpoint, device: torch.device, team: Team = ALONE
) -> Iterator[OpenedTasks | NoTasks]:
    """The tasks of a suite, with their data in a directory that is removed at the end.

    Tasks that generate text do so here, by whole models in the memory of the first member. Raises
    InputError where a task cannot be loaded, or generates text and a model does not fit.
    """
    if not suite.tasks:
        yield NoTasks()
        return
    longest = min(suite.max_length, base.positions)
    with _extra_needed(), tempfile.TemporaryDirectory(prefix="grokquant-tasks-") as directory:
        from grokquant.evaluation import lm_tasks

        tokenizer = load_tokenizer(base)
        tasks = lm_tasks.open_tasks(suite.tasks, tokenizer, longest, Path(directory))
        written = team.once(lambda: _generated(tasks, candidate, base, device))
        own, theirs = (dict(zip(tasks.prompts, texts, strict=True)) for texts in written)
        yield OpenedTasks(tasks, pack(tasks.pairs, longest, base.family.branches), (own, theirs))


def _generated(
    tasks: "LmTasks", candidate: Checkpoint, base: Checkpoint, device: torch.device
) -> list[list[str]]:
    """The texts that each of both models generates for the prompts, in their order."""
    if not tasks.prompts:
        return [[], []]
    from grokquant.evaluation import generation

    generation.check_fits(tasks, (candidate, base), device)
    return [generation.texts(tasks, model, device) for model in (candidate, base)]


@contextmanager
def _extra_needed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        extra = 'the eval extra: pip install "grokquant[eval]"'
        raise InputError(f"tasks: need {extra} ({error.name} is missing)") from None
