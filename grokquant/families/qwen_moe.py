"""Qwen2-MoE and Qwen3-MoE: some layers may be dense; Qwen2's experts have a shared one beside."""

from collections.abc import Mapping

from transformers import (
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from grokquant.families.family import Family
from grokquant.families.projections import ATTENTION, EXPERTS, MLP, shared


def _routed(config: PreTrainedConfig, layer: int) -> bool:
    dense = layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step
    return config.num_experts > 0 and not dense


def _qwen2_matrices(config: PreTrainedConfig, layer: int) -> Mapping[str, str]:
    return ATTENTION | (shared("mlp.shared_expert") if _routed(config, layer) else MLP)


def _qwen3_matrices(config: PreTrainedConfig, layer: int) -> Mapping[str, str]:
    return ATTENTION if _routed(config, layer) else ATTENTION | MLP


QWEN2_MOE = Family(
    name="qwen2-moe",
    config_class=Qwen2MoeConfig,
    model_class=Qwen2MoeForCausalLM,
    matrices=_qwen2_matrices,
    experts=EXPERTS,
    routed=_routed,
    unquantized=("mlp.gate", "mlp.shared_expert_gate"),
)
QWEN3_MOE = Family(
    name="qwen3-moe",
    config_class=Qwen3MoeConfig,
    model_class=Qwen3MoeForCausalLM,
    matrices=_qwen3_matrices,
    experts=EXPERTS,
    routed=_routed,
    unquantized=("mlp.gate",),
)
