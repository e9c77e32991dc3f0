"""Tasks of the lm-eval harness on streamed models.

lm-eval sends its requests to a model task by task. Here it does so twice. The first time, a model
without weights records the requests of all tasks as token ids; both checkpoints answer them all in
one pass. The second time, once per checkpoint, the answers are looked up and lm-eval computes its
own metrics from them. Text is cut into tokens and windows as in lm-eval's `HFLM`.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from ruamel.yaml import YAML
from transformers import PreTrainedTokenizerBase

from grokquant.errors import InputError
from grokquant.evaluation import task_data
from grokquant.evaluation.items import Metric, Scores
from grokquant.evaluation.likelihoods import Likelihood, Pair
from grokquant.evaluation.suite import TaskSection
from grokquant.files.hub import impatiently
from grokquant.memory import refused

LM_EVAL_VERSION: str = lm_eval.__version__

# Local files are read here; datasets would count each as a download on the hub.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

_FEWSHOT_SEED = 1234  # lm-eval's own
# A prompt, and how to generate from it as JSON.
Prompt = tuple[str, str]


class _AnsweringLM(TemplateLM):
    """Cuts requests into tokens as `HFLM` does, and has two functions answer them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
        answer: Callable[[Pair], Likelihood],
        generate: Callable[[Instance], str],
    ) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer
        self.max_length = longest
        self.answer = answer
        self.generate = generate

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return prefix_token(self.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            special = {"add_special_tokens": False} if has_bos_prefix(string, prefix) else {}
            return self.tokenizer.encode(string, **special)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[Likelihood]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[Likelihood]:
        return [self.answer(self._cut(context, rest)) for _, context, rest in requests]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        return [sum(self.answer(p)[0] for p in self._windows(r.args[0])) for r in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        return [self.generate(request) for request in requests]

    def _windows(self, text: str) -> Iterator[Pair]:
        """Windows that do not overlap; the prefix token precedes the first one."""
        tokens = self.tok_encode(text)
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
        return (self._cut(*make_disjoint_window(window)) for window in windows)

    def _cut(self, context: list[int], continuation: list[int]) -> Pair:
        """A context that is too long loses its start."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise InputError(
                f"tasks: {len(continuation)} tokens to predict after {len(context)}; both must be "
                f"at least 1, and the first at most max_length ({self.max_length})"
            )
        kept = self.max_length + 1 - len(continuation)
        return tuple(context[-kept:]), tuple(continuation)


def prefix_token(tokenizer: Any) -> int:
    """The token before a text that has no context: BOS, or EOS in a tokenizer without BOS."""
    bos = tokenizer.bos_token_id
    return tokenizer.eos_token_id if bos is None else bos


@dataclass
class LmTasks:
    """Tasks and their requests: `pairs` to score, `prompts` to generate from.

    `loaded` holds lm-eval's tasks of each section, and the number of items to use.
    """

    tokenizer: PreTrainedTokenizerBase
    longest: int
    loaded: list[tuple[Any, int | None]]
    pairs: dict[Pair, None] = field(default_factory=dict)
    prompts: dict[Prompt, Instance] = field(default_factory=dict)

    def scores(
        self, answers: dict[Pair, Likelihood], texts: dict[Prompt, str]
    ) -> dict[str, Scores]:
        """lm-eval's figures, by task, for a model with these answers and generated texts."""
        found: dict[str, Scores] = {}
        for results in self._evaluate(answers.__getitem__, lambda r: texts[_prompt(r)]):
            for task in results["samples"]:
                found[task] = _scores(task, results)
        return found

    def record_requests(self) -> None:
        """Fills `pairs` and `prompts`; the answers given here mean nothing."""

        def score(pair: Pair) -> Likelihood:
            self.pairs[pair] = None
            return 0.0, False

        def generate(request: Instance) -> str:
            self.prompts[_prompt(request)] = request
            return ""

        self._evaluate(score, generate)

    def _evaluate(
        self, answer: Callable[[Pair], Likelihood], generate: Callable[[Instance], str]
    ) -> list[dict]:
        """lm-eval's results of each section, all requests answered by the two functions."""
        model = _AnsweringLM(self.tokenizer, self.longest, answer, generate)
        results = []
        for loaded, items in self.loaded:
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(_FEWSHOT_SEED)  # the same examples each time
            with _quiet():
                results.append(lm_eval.evaluate(model, loaded, limit=items, bootstrap_iters=0))
        return results


def open_tasks(
    wanted: Sequence[TaskSection],
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    directory: Path,
) -> LmTasks:
    """Loads tasks and records their requests to a model that takes `longest` tokens at once.

    The data of shipped tasks is written to `directory`, which must outlast the tasks. Raises
    InputError.
    """
    loaded = [(_load(task, directory), task.items) for task in wanted]
    tasks = LmTasks(tokenizer, longest, loaded)
    tasks.record_requests()
    return tasks


def _load(wanted: TaskSection, directory: Path) -> Any:
    spec: str | dict = wanted.name
    if wanted.name in task_data.MAKERS:
        spec = _shipped(wanted.name, directory)
    by_name = isinstance(spec, str) and Path(spec).suffix not in (".yaml", ".yml")
    if by_name and wanted.name not in _manager(stock=True).all_tasks:
        near = get_close_matches(wanted.name, _manager(stock=True).all_tasks, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise InputError(f"tasks: {wanted.name}: lm-eval has no task of this name{hint}")
    waiting = impatiently() if by_name else contextlib.nullcontext()  # theirs are on the hub
    with refused(f"tasks: {wanted.name}: cannot be loaded"), _quiet(), waiting:
        loaded = _manager(by_name).load([spec])
    for task in loaded["tasks"].values():
        if wanted.fewshot is not None:
            task.set_config(key="num_fewshot", value=wanted.fewshot)
    return loaded


@cache
def _manager(stock: bool) -> TaskManager:
    """With `stock`, a manager that knows lm-eval's own tasks; finding them takes seconds."""
    return TaskManager(include_defaults=stock)


def _shipped(name: str, directory: Path) -> dict:
    """The config of a task of this package, with its data written to `directory`."""
    config = YAML(typ="safe").load(task_data.SHIPPED / f"{name}.yaml")
    data = task_data.write_items(name, directory)
    files = {"test": str(data)}
    return config | {"dataset_kwargs": {"data_files": files, "cache_dir": str(directory)}}


def _scores(task: str, results: dict) -> Scores:
    samples = results["samples"][task]
    items: dict[Metric, dict[int, Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            items.setdefault((metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    return Scores(
        version=str(results["versions"][task]),
        fewshot=results["n-shot"].get(task) or 0,
        sha256=_digest(samples),
        values={key: results["results"][task][",".join(key)] for key in items},
        items=items,
        higher_is_better=results["higher_is_better"].get(task, {}),
    )


def _digest(samples: list[dict]) -> str:
    """SHA-256 in hex of all documents, prompts and targets, as lm-eval computes its task hash."""
    parts = (s[key] for s in samples for key in ("doc_hash", "prompt_hash", "target_hash"))
    return sha256("".join(parts).encode()).hexdigest()


def _prompt(request: Instance) -> Prompt:
    prompt, settings = request.args
    return prompt, json.dumps(settings, sort_keys=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences progress bars and warnings of lm-eval and datasets; their errors are raised."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if not shown:
            datasets.enable_progress_bars()
