"""The Hugging Face hub: whether it can be reached, without the minutes that its library waits."""

from collections.abc import Iterator
from contextlib import contextmanager

_SECONDS = 5.0  # for one small answer


@contextmanager
def impatiently() -> Iterator[None]:
    """In the block, the libraries of the hub use their caches alone if it does not answer once.

    They would retry each file for 23 seconds.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(address, timeout=_SECONDS)
    except Exception:  # no address, no route, no answer, no certificate
        return False
    return True
