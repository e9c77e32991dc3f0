"""What the tasks of a suite ask, and what comes of the answers. lm-eval is imported if there are
any."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.evaluation import report as parts
from grokquant.evaluation.items import ItemResults, paired_items, task_rows
from grokquant.evaluation.likelihoods import Batch, Likelihood, Pair, pack
from grokquant.evaluation.suite import Suite
from grokquant.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from grokquant.evaluation.lm_tasks import LmTasks, Prompt

Results = tuple[parts.Tasks | None, list[ItemResults]]


@dataclass
class NoTasks:
    """A suite of texts alone."""

    batches: list[Batch] = field(default_factory=list)

    def results(self, own: dict[Pair, Likelihood], base: dict[Pair, Likelihood]) -> Results:
        return None, []


@dataclass
class AskedTasks:
    """`batches` are for both models to answer; `texts` are what both have written."""

    tasks: "LmTasks"
    batches: list[Batch]
    texts: "tuple[dict[Prompt, str], dict[Prompt, str]]"

    def results(self, own: dict[Pair, Likelihood], base: dict[Pair, Likelihood]) -> Results:
        """The tasks for the report, and item by item, from the answers of both models."""
        from grokquant.evaluation import lm_tasks

        quantized = self.tasks.scores(own, self.texts[0])
        reference = self.tasks.scores(base, self.texts[1])
        items = list(paired_items(quantized, reference))
        rows = parts.Tasks(
            lm_eval=lm_tasks.LM_EVAL_VERSION,
            max_length=self.tasks.longest,
            prefix_token=lm_tasks.prefix_token(self.tasks.tokenizer),
            tasks=task_rows(quantized, reference, items),
        )
        return rows, items


@contextmanager
def opened_tasks(
    suite: Suite, candidate: Checkpoint, base: Checkpoint, device: torch.device
) -> Iterator[AskedTasks | NoTasks]:
    """The tasks of a suite, their data in a directory that goes with the context.

    Texts to be generated are generated here, by whole models in memory. Raises InputError where a
    task cannot be loaded, or generates and a model does not fit.
    """
    if not suite.tasks:
        yield NoTasks()
        return
    longest = min(suite.max_length, base.config.max_position_embeddings)
    with _extra_needed(), tempfile.TemporaryDirectory(prefix="grokquant-tasks-") as directory:
        from grokquant.evaluation import lm_tasks

        tokenizer = load_tokenizer(base)
        tasks = lm_tasks.open_tasks(suite.tasks, tokenizer, longest, Path(directory))
        texts = _written(tasks, candidate, base, device)
        yield AskedTasks(tasks, pack(tasks.pairs, longest), texts)


def _written(
    tasks: "LmTasks", candidate: Checkpoint, base: Checkpoint, device: torch.device
) -> "tuple[dict[Prompt, str], dict[Prompt, str]]":
    """What both models make of the prompts, if there are any."""
    if not tasks.prompts:
        return {}, {}
    from grokquant.evaluation import generation

    generation.check_fits(tasks, (candidate, base), device)
    return generation.texts(tasks, candidate, device), generation.texts(tasks, base, device)


@contextmanager
def _extra_needed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        extra = 'the eval extra: pip install "grokquant[eval]"'
        raise InputError(f"tasks: {error.name} is missing, they need {extra}") from None
