"""What published files say of paths: nothing of the machine on which they were made."""

import re
from pathlib import PurePath

# Two names of letters, digits and .-_ that neither begin nor end with . or -.
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_NAME}/{_NAME}")
# A cached model is in models--ORGANIZATION--NAME/snapshots/REVISION.
_CACHED = re.compile(r"models--(.+?)--(.+)")


def published_path(path: str) -> str:
    """`path` as it was typed if that is relative, else its last part, or the repository that a
    download cache holds there. Bytes that are not UTF-8 are escaped: no text file can hold them."""
    shown = path.encode("utf-8", "backslashreplace").decode()
    place = PurePath(shown)
    if not place.is_absolute() and not shown.startswith("~"):
        return shown
    return cached_repository(place) or place.name or "model"


def cached_repository(place: PurePath) -> str | None:
    """ORGANIZATION/NAME of a path into the cache of the Hugging Face hub, else None."""
    for folder, below in zip(place.parts, place.parts[1:], strict=False):
        if below == "snapshots" and (found := _CACHED.fullmatch(folder)):
            repository = f"{found[1]}/{found[2]}"
            return repository if is_repository(repository) else None
    return None


def is_repository(name: object) -> bool:
    """Whether `name` can be that of a repository on the hub: ORGANIZATION/NAME."""
    return (
        isinstance(name, str)
        and _REPOSITORY.fullmatch(name) is not None
        and "--" not in name
        and ".." not in name
        and not name.endswith(".git")
    )
