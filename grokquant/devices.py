"""Where arithmetic happens: chosen on the command line, never in a recipe."""

import re

import torch

from grokquant.errors import InputError

CPU = torch.device("cpu")
_AMPERE = (8, 0)  # the first GPUs with such products


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 products there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _AMPERE
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 lacks it
    return any(known.get(name) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))


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
        raise InputError(f"device {name}: {reason}; the device cpu needs none of it") from None
    return torch.device(name)
