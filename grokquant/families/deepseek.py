"""DeepSeek-V2: low-rank attention, dense first layers, shared experts beside the routed ones."""

from collections.abc import Mapping

from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedConfig

from grokquant.families.family import Family
from grokquant.families.projections import EXPERTS, MLP, shared

_QUERY = {"attention.q": "self_attn.q_proj.weight"}
_LOW_RANK_QUERY = {
    "attention.q_a": "self_attn.q_a_proj.weight",
    "attention.q_b": "self_attn.q_b_proj.weight",
}
_KEYS_AND_VALUES = {
    "attention.kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_b": "self_attn.kv_b_proj.weight",
    "attention.o": "self_attn.o_proj.weight",
}
# vLLM and SGLang read them; transformers computes as they say in the released models.
_READ_BY_ENGINES = {"aux_loss_alpha", "ep_size", "moe_layer_freq", "scoring_func", "seq_aux"}


def _routed(config: PreTrainedConfig, layer: int) -> bool:
    return layer >= config.first_k_dense_replace


def _matrices(config: PreTrainedConfig, layer: int) -> Mapping[str, str]:
    query = _QUERY if config.q_lora_rank is None else _LOW_RANK_QUERY
    mlp = shared("mlp.shared_experts") if _routed(config, layer) else MLP
    return query | _KEYS_AND_VALUES | mlp


DEEPSEEK_V2 = Family(
    name="deepseek-v2",
    config_class=DeepseekV2Config,
    model_class=DeepseekV2ForCausalLM,
    matrices=_matrices,
    experts=EXPERTS,
    routed=_routed,
    unquantized=("mlp.gate",),
    other_fields=frozenset(_READ_BY_ENGINES),
)
