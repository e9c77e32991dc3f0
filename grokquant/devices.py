"""Where arithmetic happens: chosen on the command line, never in a recipe."""

import re

import torch

from grokquant.errors import InputError

CPU = torch.device("cpu")


def device_of(name: str) -> torch.device:
    """The device that torch calls `name`; `auto` is the first GPU, or the CPU where there is none.

    Raises InputError if it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda(:\d{1,3})?)", name):
        raise InputError(f"expected auto, cpu, cuda or cuda:N, not {name!r}", "device")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # torch raises both
        reason = (str(error).splitlines() or ["cannot be used"])[0]
        raise InputError(f"device {name}: {reason}") from None
    return torch.device(name)
