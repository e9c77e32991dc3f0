"""The files of a tokenizer, checked before transformers, tokenizers and SentencePiece read them."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from grokquant.errors import InputError
from grokquant.families.tokenizer_patterns import check_pattern, patterns_in
from grokquant.files.impostors import impostor
from grokquant.files.json_objects import parse_json_object, read_json_object
from grokquant.files.regular import read_regular

# The largest tokenizers have 40 MB and 1,500,000 values.
_MAX_BYTES = 64_000_000
_MAX_VALUES = 4_000_000
_VOCABULARIES = {"tokenizer.json", "vocab.json", "added_tokens.json"}
# A damaged file can end the process in which the tokenizers library reads it, beyond any `except`.
# So it is first read and used in another one, which has a limit of memory and of processor time.
_TRIAL = """
import resource, sys
for kind, most in ((resource.RLIMIT_AS, 8 << 30), (resource.RLIMIT_CPU, 300)):
    present = resource.getrlimit(kind)[1]
    limit = most if present == resource.RLIM_INFINITY else min(most, present)
    resource.setrlimit(kind, (limit, limit))
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
tokenizer.decode(tokenizer.encode("Hello  w\\u00f6rld 123\\n\\nnext").ids)
"""
# How many times longer a normalizer may make a text. In use are replacements by as much or less.
_MAX_GROWTH = 100


def check_tokenizer_files(files: Iterable[Path]) -> None:
    """Raises InputError naming a file that is no regular one, too large, not JSON where it should
    be, or which would take endless time or memory to use."""
    for path in files:
        if path.suffix != ".json":
            _check_other(path)
        elif path.name in _VOCABULARIES:
            raw = read_regular(path, _MAX_BYTES)
            content = parse_json_object(raw, str(path), most_values=_MAX_VALUES)
            if path.name == "tokenizer.json":
                _check_steps(path, content)
                _try_out(path)
        else:
            read_json_object(path)


def _check_other(path: Path) -> None:
    if what := impostor(read_regular(path, _MAX_BYTES)[:200]):
        raise InputError(f"{path}: {what}")


def _check_steps(path: Path, content: dict) -> None:
    """Checks what a tokenizer.json does to a text, before and after its model."""
    for step in content.keys() - {"model"}:
        for pattern in patterns_in(content[step]):
            try:
                check_pattern(pattern)
            except ValueError as error:
                raise InputError(
                    f"{path}: {step}: regular expression {pattern[:80]!r}: {error}"
                ) from None
    if _growth(content.get("normalizer")) > _MAX_GROWTH:
        raise InputError(f"{path}: normalizer: makes texts more than {_MAX_GROWTH} times longer")


def _try_out(path: Path) -> None:
    """Raises InputError where the tokenizers library cannot read or use a tokenizer.json."""
    run = subprocess.run(
        [sys.executable, "-P", "-c", _TRIAL, str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false"},
    )
    if run.returncode:
        complaints = run.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason"]
        raise InputError(f"{path}: cannot be read as a tokenizer: {complaints[-1][:300]}")


def _growth(step: object) -> float:
    """At most how many times longer a step of the normalizer makes a text."""
    match step:
        case {"normalizers": [*steps]}:
            whole = 1.0
            for inner in steps:
                whole = min(whole * _growth(inner), _MAX_GROWTH + 1)  # no overflow
            return whole
        case {"type": "Replace", "content": str(content), "pattern": {"String": str(pattern)}}:
            return max(1, len(content) / max(1, len(pattern)))
        case {"type": "Replace", "content": str(content)}:  # a pattern may match one character
            return max(1, len(content))
        case {"type": "Prepend", "prepend": str(prefix)}:
            return 1 + len(prefix)
    return 1
