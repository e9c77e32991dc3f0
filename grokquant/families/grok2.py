"""Grok-2, experimental: its config.json names Grok-1's architecture and sets `residual_moe`.

There is no released model code. The computation and the names of tensors follow SGLang; settings
that change the computation in ways not implemented here are refused.
"""

from collections.abc import Mapping
from pathlib import Path

from grokquant.errors import InputError
from grokquant.families.family import Family, everywhere
from grokquant.families.grok import ALIASES, EXPERTS
from grokquant.families.grok2_model import Grok2Config, Grok2ForCausalLM
from grokquant.families.projections import ATTENTION, MLP
from grokquant.sources.grok_config import model_fields, positive_number

_OWN: Mapping[str, type] = {
    "moe_intermediate_size": int,
    "router_logit_softcapping": float,
    "final_logit_softcapping": float,
}
# Further settings of the computation, and their supported values. The rope type `original` is the
# plain rotary embedding, even if the config also gives scaling factors.
_UNDERSTOOD: Mapping[str, tuple] = {
    "rope_type": (None, "original", "default"),
    "rope_scaling": (None,),
    "rope_rotate_half_dims": (None, False),
    "attn_logit_softcapping_method": (None, "tanh"),
    "sliding_window_size": (None, -1),
    "global_attn_every_n": (None, 1),
}
# SGLang reads them, too; they scale positions only under a rope type that is not supported here.
_SCALING = {"scaling_factor", "extrapolation_factor", "attn_factor", "beta_fast", "beta_slow"}
_READ_BY_SGLANG = {*_UNDERSTOOD, *_SCALING, "residual_moe"}


def _fields(path: Path, content: dict) -> dict:
    for key, values in _UNDERSTOOD.items():
        if content.get(key) not in values:
            raise InputError(f"{path}: {key} is {content[key]!r:.40}, which is not supported yet")
    own = {key: positive_number(path, key, content.get(key), kind) for key, kind in _OWN.items()}
    length = content.get("attn_temperature_len", -1)
    if type(length) is not int or not (length == -1 or length > 1):
        raise InputError(f"{path}: attn_temperature_len must be -1 or above 1, not {length!r:.40}")
    head = content.get("tie_word_embeddings", False)
    if type(head) is not bool:
        raise InputError(f"{path}: tie_word_embeddings must be true or false, not {head!r:.40}")
    for key in ("rope_theta", "max_position_embeddings"):  # Grok-1 has other defaults
        if key not in content:
            raise InputError(f"{path}: config.json must also give {key}")
    shared = {key: value for key, value in content.items() if key not in _NOT_SHARED}
    return (
        model_fields(path, _with_scale(shared))
        | own
        | {"residual_moe": True, "attn_temperature_len": length, "tie_word_embeddings": head}
    )


_NOT_SHARED = {*_OWN, *_UNDERSTOOD, "residual_moe", "attn_temperature_len", "tie_word_embeddings"}


def _with_scale(content: dict) -> dict:
    """Adds the usual scale of attention logits, 1 / sqrt(head_dim), if the config has none."""
    match content:
        case {"head_dim": int(size)} if size > 0:
            return {"attn_output_multiplier": size**-0.5} | content
    return content


GROK_2 = Family(
    name="grok-2",
    config_class=Grok2Config,
    model_class=Grok2ForCausalLM,
    architecture="Grok1ForCausalLM",
    matrices=everywhere(ATTENTION | MLP),
    experts=EXPERTS,
    unquantized=("block_sparse_moe.gate",),
    aliases=ALIASES,
    fused="block_sparse_moe.experts",
    router_norm="pre_moe_norm",
    mlp_norm=None,
    attention_norm="post_attn_norm",
    mixture_norm=None,  # their sum is added to a dense MLP before the norm
    fields=_fields,
    other_fields=frozenset(_READ_BY_SGLANG),
    notice="Grok-2 is experimental: without released model code, its computation follows SGLang's",
)
