"""Errors that a user can cause or must see: one line each, with the documented exit code."""


class GrokquantError(Exception):
    """Base of all errors that end a command with one line on stderr instead of a traceback."""

    exit_code = 1


class InputError(GrokquantError):
    """An unusable file, recipe, option or directory (exit 2). The text names it.

    `key` is the parameter at fault, by its name in Python; the command line shows its option.
    """

    exit_code = 2

    def __init__(self, text: str, key: str | None = None) -> None:
        super().__init__(text if key is None else f"{key}: {text}")
        self.text = text
        self.key = key


class OutOfMemory(InputError):
    """Memory ran out (exit 2). The text names the step."""


def said_by(error: BaseException, most: int = 300) -> str:
    """What the exception of a library says, on one line of at most `most` characters: some are
    pages long."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class GateError(GrokquantError):
    """The result failed a quality or verification gate (exit 1)."""

    exit_code = 1


class Elsewhere(GrokquantError):
    """Another process of the same run has failed or was lost (exit 1). The text says what is known
    of it here; the other one says why."""

    exit_code = 1


class Stopped(KeyboardInterrupt):
    """A signal, SIGINT or SIGTERM, stopped the run; everything committed is kept (exit 130).

    Like any KeyboardInterrupt it passes `except Exception`, which would keep a process alive that
    was asked to end.
    """

    exit_code = 130
