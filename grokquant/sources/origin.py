"""What a directory says of the model in it: its name, its place on the hub, licence, languages."""

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from grokquant.files.published import cached_repository, is_repository
from grokquant.files.regular import read_head
from grokquant.types import Origin

CARD = "README.md"
_FRONT_BYTES = 65_536  # of a model card: its front matter has a few hundred
LICENCE_KEYS = ("license", "license_name", "license_link")
_KEYS = {*LICENCE_KEYS, "language", "base_model", "base_model_relation"}
_KEY = re.compile(r"([a-z_]+):")
# What the hub takes as an identifier of a licence.
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(?:-[A-Za-z0-9]+)?|multilingual")
# The name of a licence that only a file states.
_IN_FILE = "see-license-file"


def origin_of(path: Path, config: Mapping[str, Any], beside: Mapping[str, Path]) -> Origin:
    """The origin of the model in directory `path`.

    `config` is its config.json as it is, `beside` are the files that an output takes over.
    """
    card = front_matter(path / CARD)
    place = path.absolute()
    folder = place.parent if place.name == "ckpt-0" else place
    own = cached_repository(place) or _named_repository(folder, config)
    languages = card.get("language")
    listed = languages if isinstance(languages, list) else [languages]
    origin = Origin(
        name=own.partition("/")[2] if own else folder.name or "model",
        base_model=own or _base_of(card),
        languages=tuple(x for x in listed if isinstance(x, str) and _LANGUAGE.fullmatch(x)),
    )
    return with_licence(origin, card, beside)


def front_matter(card: Path) -> dict[str, Any]:
    """The values that we use of the front matter of a model card; those not readable are left out.

    Each key is parsed by itself, since cards of models hold all kinds of YAML.
    """
    if not card.is_file():
        return {}
    head = read_head(card, _FRONT_BYTES).decode("utf-8", "replace")
    first, *lines = head.splitlines() or [""]
    if first.rstrip() != "---" or "---" not in (line[:3] for line in lines):
        return {}
    blocks: dict[str, list[str]] = {}
    block: list[str] = []
    for line in takewhile(lambda line: not line.startswith("---"), lines):
        if found := _KEY.match(line):
            block = blocks.setdefault(found[1], [])
        block.append(line)
    values = {key: _value(key, "\n".join(blocks[key])) for key in sorted(_KEYS & blocks.keys())}
    return {key: value for key, value in values.items() if value is not None}


def _value(key: str, block: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(block)[key]
    except (YAMLError, RecursionError, ValueError, OverflowError, KeyError, TypeError):
        return None


def _named_repository(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The repository that config.json names, if the directory has its name as well.

    Otherwise it may be the model from which this one was trained.
    """
    named = config.get("_name_or_path")
    if not is_repository(named):
        return None
    same = str(named).partition("/")[2].lower() == folder.name.lower()
    return str(named) if same else None


def _base_of(card: Mapping[str, Any]) -> str | None:
    """The model that a quantized one was made from: that of its copies, too."""
    base = card.get("base_model")
    quantized = card.get("base_model_relation") == "quantized"
    return str(base) if quantized and is_repository(base) else None


def with_licence(origin: Origin, card: Mapping[str, Any], beside: Mapping[str, Path]) -> Origin:
    """`origin` with the licence that a card states under `license` and the keys that go with it."""
    stated, name, link = (card.get(key) for key in LICENCE_KEYS)
    files = [file for file in beside if file.upper().startswith(("LICENSE", "LICENCE"))]
    if not isinstance(stated, str):
        if not files:
            return origin
        return replace(origin, licence="other", licence_name=_IN_FILE, licence_link=files[0])
    if not _LICENCE.fullmatch(stated):
        return replace(origin, licence="other", licence_name=_slug(stated))
    return replace(
        origin,
        licence=stated,
        licence_name=_slug(name) if isinstance(name, str) else None,
        licence_link=_reachable(link, origin.base_model, beside),
    )


def _reachable(link: object, repository: str | None, beside: Mapping[str, Path]) -> str | None:
    """A link to a licence that also works from an output."""
    if not isinstance(link, str):
        return None
    if link in beside or re.match(r"https?://", link):
        return link
    return f"https://huggingface.co/{repository}/blob/main/{link}" if repository else None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.+-]+", "-", name.lower()).strip("-") or "other"
