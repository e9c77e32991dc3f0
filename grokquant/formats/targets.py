"""Patterns by which a config names many modules at once, as compressed-tensors and engines do.

A target is a module's name, a regular expression after `re:`, or the class `Linear`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from grokquant.formats.patterns import pattern
from grokquant.version import OWN

Value = TypeVar("Value")

# Engines that fuse experts ask for these names, whatever the files call them, and have their own
# names for some modules above.
_EXPERT_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_MODULES = {"block_sparse_moe": "mlp|moe_block", "self_attn": "attn"}
# A module's last name -> those of the modules in which engines compute it with its neighbours.
_FUSED = {
    "q_proj": ("qkv_proj",),
    "k_proj": ("qkv_proj",),
    "v_proj": ("qkv_proj",),
    "gate_proj": ("gate_up_proj",),
    "up_proj": ("gate_up_proj",),
    "q_a_proj": ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),  # vLLM, SGLang
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
}
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.")


def targets_of(stems: list[str], others: set[str]) -> list[str]:
    """A few patterns that match all of `stems` and none of `others`.

    Layer and expert numbers become \\d+ where that matches no other module.
    """
    targets: dict[str, None] = {}
    for stem in stems:
        if any(matches(stem, target) for target in targets):
            continue
        general = f"re:^{_general(stem)}$"
        clash = any(matches(other, general) for other in others)
        targets[f"re:^{_also(re.escape(stem))}$" if clash else general] = None
    return list(targets)


def engine_targets(
    groups: Iterable[list[str]], unquantized: Iterable[str], fused_experts: bool
) -> tuple[list[list[str]], list[str]]:
    """Targets of each group of modules and of the unquantized ones, for engines that fuse modules.

    vLLM and SGLang look up `qkv_proj` first and q_proj, k_proj, v_proj later, if at all. So a fused
    module is named wherever all of its parts are; the module `experts` only if `fused_experts`.
    """
    named = [*groups, sorted(unquantized)]
    holders: dict[str, set[int]] = {}  # fused module -> the groups of its parts
    for number, stems in enumerate(named):
        for fused in (fused for stem in stems for fused in _fused(stem, fused_experts)):
            holders.setdefault(fused, set()).add(number)
    for number, stems in enumerate(named):
        stems = [*stems, *(fused for fused, of in holders.items() if of == {number})]
        named[number] = stems
    quantized = {stem for stems in named[:-1] for stem in stems}
    targets = [targets_of(stems, quantized - set(stems)) for stems in named]
    return targets[:-1], targets[-1]


def own_config(
    output_format: str, by_grid: Mapping[str, list[str]], unquantized: Iterable[str]
) -> dict:
    """The `quantization_config` of an output that only our loader reads: targets by grid."""
    everything = {stem for stems in by_grid.values() for stem in stems}
    groups = {
        grid: {"targets": targets_of(stems, everything - set(stems))}
        for grid, stems in by_grid.items()
    }
    ignored = targets_of(sorted(unquantized), everything)
    named = {"quant_method": OWN, "format": output_format}
    return named | {"config_groups": groups, "ignore": ignored}


def matches(stem: str, target: str) -> bool:
    """Whether `target` matches the module `stem`."""
    if target.startswith("re:"):
        return pattern(target[3:]).match(stem)
    return target in (stem, "Linear") or stem.endswith("." + target)


def first_match(stem: str, targets: Iterable[tuple[str, Value]]) -> Value | None:
    """The value of the target that matches `stem`: of the first by name, else of `Linear`."""
    found = [(target == "Linear", value) for target, value in targets if matches(stem, target)]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def check_target(target: str) -> str:
    """Returns `target`. Raises ValueError where it claims to be a regular expression but is not, or
    is one that is not supported."""
    try:
        matches("", target)
    except ValueError as error:
        raise ValueError(f"not a regular expression that can be used: {error}") from None
    return target


def _fused(stem: str, experts: bool) -> tuple[str, ...]:
    """The modules of engines in which the module `stem` may be computed with others."""
    if expert := _EXPERT.match(stem):
        return (expert[1],) if experts else ()
    parent, _, last = stem.rpartition(".")
    return tuple(f"{parent}.{fused}" for fused in _FUSED.get(last, ()))


def _general(stem: str) -> str:
    """A pattern of this module in any layer and any expert, under the names of engines too."""
    return _also(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(stem)))


def _also(pattern: str) -> str:
    for name, alias in _MODULES.items():
        pattern = pattern.replace(rf"\.{name}\.", rf"\.(?:{name}|{alias})\.")
    for name, alias in _EXPERT_PARTS.items():
        pattern = re.sub(rf"(experts\\\.\S+\\\.){name}$", rf"\1(?:{name}|{alias})", pattern)
    return pattern
