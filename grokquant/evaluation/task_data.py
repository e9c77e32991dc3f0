"""Data of the shipped tasks, made from the held-out part of Python's documentation.

    python -m grokquant.evaluation.task_data DIRECTORY

writes the tasks and their data to files, for lm-eval's own command line with `--include_path
DIRECTORY`.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from grokquant.files.atomic import write_text
from grokquant.text import python_docs

Item = dict[str, object]
SHIPPED = Path(__file__).parent / "tasks"

_WORD = re.compile(r"\S+")
_PASSAGE = 40  # words of context: a few sentences
_CONTINUATION = 12  # words of each choice: about one sentence
_SHORTEST = 4  # letters of a word to guess: neither "the" nor "of"
_CHOICES = 4


def cloze_items(documents: list[str]) -> Iterator[Item]:
    """Passages and the `word` that follows, which occurs in the passage as well."""
    for text in documents:
        words = list(_WORD.finditer(text))
        start = 0
        for end in range(_PASSAGE, len(words)):
            before = words[start:end]
            if len(before) >= _PASSAGE and _is_known(words[end], before, text):
                context = text[before[0].start() : before[-1].end()]
                yield {"context": context, "word": f" {words[end].group()}"}
                start = end + 1


def _is_known(word: re.Match, before: list[re.Match], text: str) -> bool:
    """Whether `word` has letters only, follows a space, and occurs in `before`."""
    plain = word.group().isalpha() and len(word.group()) >= _SHORTEST
    after_space = text[before[-1].end() : word.start()] == " "
    return plain and after_space and word.group() in {other.group() for other in before}


def choice_items(documents: list[str]) -> Iterator[Item]:
    """Passages with four `choices` of continuations; `answer` is the index of the true one."""
    found = [
        (number, *passage) for number, text in enumerate(documents) for passage in _passages(text)
    ]
    draw = Random(0)
    for number, context, continuation in found:
        others = [other for source, _, other in found if source != number]
        choices = draw.sample(others, _CHOICES - 1)
        answer = draw.randrange(_CHOICES)
        choices.insert(answer, continuation)
        yield {"context": context, "choices": choices, "answer": answer}


def _passages(text: str) -> Iterator[tuple[str, str]]:
    """Contexts and their continuations, which begin with white space."""
    words = list(_WORD.finditer(text))
    for start in range(0, len(words) - _PASSAGE - _CONTINUATION, _PASSAGE + _CONTINUATION):
        first = words[start]
        last = words[start + _PASSAGE - 1]
        end = words[start + _PASSAGE + _CONTINUATION - 1].end()
        yield text[first.start() : last.end()], text[last.end() : end]


def perplexity_items(documents: list[str]) -> Iterator[Item]:
    for text in documents:
        yield {"text": text}


MAKERS: dict[str, Callable[[list[str]], Iterator[Item]]] = {
    "python_docs_cloze": cloze_items,
    "python_docs_choice": choice_items,
    "python_docs_perplexity": perplexity_items,
}


def write_items(task: str, directory: Path) -> Path:
    """Writes the items of a shipped task as JSON lines, in a fixed random order."""
    items = list(MAKERS[task](python_docs.documents("heldout")))
    Random(0).shuffle(items)
    path = directory / f"{task}.jsonl"
    write_text(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    return path


def write_task(task: str, directory: Path) -> Path:
    """Writes the data of a shipped task, and its YAML file, which says where they are."""
    data = write_items(task, directory)
    text = (SHIPPED / f"{task}.yaml").read_text(encoding="utf-8")
    path = directory / f"{task}.yaml"
    write_text(path, text.replace(data.name, json.dumps(str(data.resolve()))))
    return path


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    for name in MAKERS:
        print(write_task(name, place))
