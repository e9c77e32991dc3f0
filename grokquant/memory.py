"""What libraries raise: memory that runs out, whichever says so and however, and refusals."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import clear_frames

from grokquant.errors import GrokquantError, InputError, OutOfMemory, said_by

# In lower case, what those say that raise neither MemoryError nor an OSError with ENOMEM.
_SIGNS = (
    "can't allocate memory",  # torch
    "cannot allocate memory",  # the C library, through safetensors and others
    "out of memory",  # CUDA
    "alloc_failed",  # cuBLAS, cuDNN
    "could not create a memory",  # oneDNN
    "could not create a primitive",
    "bad_alloc",  # C++
    "can't start new thread",  # Python: no room for its stack
    "failed to map segment",  # the loader of shared libraries
)
_LONGEST_REASON = 200


@contextmanager
def memory_for(step: str) -> Iterator[None]:
    """Raises OutOfMemory, which names `step`, where memory runs out inside the block.

    The innermost block names it. Other errors pass through.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, GrokquantError) or not is_exhausted(error):
            raise
        clear_frames(error.__traceback__)  # whose variables hold the memory
        reason = said_by(error, _LONGEST_REASON)
        raise OutOfMemory(f"{step}: out of memory ({reason})") from None


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Raises InputError, `what` and the reason, where a library refuses what it is given.

    Libraries do so with exceptions of any class. Our own errors and memory that runs out pass
    through, and so do signals.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, GrokquantError) or not _is_refusal(error):
            raise
        raise InputError(f"{what}: {said_by(error)}") from None


def _is_refusal(error: BaseException) -> bool:
    if isinstance(error, Exception):
        return not is_exhausted(error)
    return type(error).__name__ == "PanicException"  # of a library in Rust


def is_exhausted(error: Exception) -> bool:
    """Whether it says that there is no memory left."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return any(sign in text for sign in _SIGNS)
