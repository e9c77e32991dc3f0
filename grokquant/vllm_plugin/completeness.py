"""Which tensors a Grok-1 consists of. vLLM itself leaves out what is missing without a word."""

import re
from collections.abc import Collection, Iterable, Iterator

from transformers import PreTrainedConfig

from grokquant.errors import InputError
from grokquant.families.grok import GROK_1

# The endings of the tensors that store a matrix, by format.
_COMPLETE = (
    {"weight"},
    {"weight_packed", "weight_scale", "weight_shape"},
    {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"},
    {"qweight", "qzeros", "scales", "g_idx"},
)
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_NORMS = ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm")
# It repeats the embedding, where `output.lm_head` asked for it.
_TIED = "lm_head.weight"


def check_complete(
    names: Iterable[str], config: PreTrainedConfig, experts: Collection[int]
) -> None:
    """Raises InputError unless the checkpoint names `names` are those of a whole Grok-1.

    `experts` are the numbers of the experts that this process reads, in every layer.
    """
    found: dict[str, set[str]] = {}
    for name in names:
        module, _, ending = name.rpartition(".")
        found.setdefault(module, set()).add(ending)
    found.pop(_TIED.removesuffix(".weight"), None)
    dense = set(_dense_modules(config))
    matrices = {
        matrix.tensor.removesuffix(".weight")
        for matrix in GROK_1.units(config)
        if matrix.expert is None or matrix.expert in experts
    }
    if unknown := sorted(found.keys() - dense - matrices):
        raise InputError(f"unexpected tensor in {unknown[0]}: Grok-1 has no such module")
    for module in sorted(dense | matrices):
        whole = _COMPLETE if module in matrices else _COMPLETE[:1]
        if (endings := found.get(module, set())) not in whole:
            raise InputError(f"{module} is incomplete: there is {sorted(endings) or 'nothing'}")


def expert_of(name: str) -> int | None:
    """The number of the expert that a tensor belongs to, None outside the experts."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None


def _dense_modules(config: PreTrainedConfig) -> Iterator[str]:
    """The modules that are never quantized."""
    yield from ("model.embed_tokens", "model.norm")
    yield from (name.removesuffix(".weight") for name in GROK_1.routers(config))
    for layer in range(config.num_hidden_layers):
        prefix = GROK_1.layer_prefix.format(layer=layer)
        yield from (prefix + norm for norm in _NORMS)
