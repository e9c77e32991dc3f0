"""What to say of a path at which there is nothing."""

import os
from difflib import get_close_matches
from pathlib import Path

_MOST = 10_000  # entries of a directory that are looked at


def instead_of(path: Path) -> str:
    """`; did you mean ...?`, the entry beside which `path` is that is most like it, in whatever
    case; else, of a relative path, where it was looked for; else nothing."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry, _ in zip(entries, range(_MOST), strict=False)]
    except (OSError, ValueError):  # not a directory that can be read, or no name of one
        names = []
    folded = {name.casefold(): name for name in names}
    if near := get_close_matches(path.name.casefold(), folded, n=1, cutoff=0.85):
        return f"; did you mean {path.with_name(folded[near[0]])}?"
    return "" if path.is_absolute() else f"; looked in {Path.cwd()}"
