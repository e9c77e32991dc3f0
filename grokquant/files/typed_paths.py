"""Paths as people type them."""

import os
import re

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expanded(path: str) -> str:
    """`path` with `~`, `$DATA` and `${DATA}` replaced as a shell does: it leaves them as they are
    after `=` and in quotes. Raises ValueError naming a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"{path}: the environment variable {name} is not set")
        return os.environ[name]

    at_home = os.path.expanduser(path)
    if at_home.startswith("~"):
        user = at_home.partition("/")[0]
        raise ValueError(f"{path}: no home directory is known for {user}; ./{user} is a file here")
    return _VARIABLE.sub(value, at_home)
