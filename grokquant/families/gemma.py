"""Gemma 2 and the text models of Gemma 3."""

from dataclasses import replace

from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from grokquant.families.family import Family, everywhere
from grokquant.families.projections import ATTENTION, MLP

_MATRICES = everywhere(ATTENTION | MLP)
_AFTER_ATTENTION = "post_attention_layernorm"
_AFTER_MLP = "post_feedforward_layernorm"

GEMMA_2 = Family(
    name="gemma-2",
    config_class=Gemma2Config,
    model_class=Gemma2ForCausalLM,
    matrices=_MATRICES,
    attention_norm=_AFTER_ATTENTION,
    mlp_norm=_AFTER_MLP,
    norm_offset=1.0,
)
GEMMA_3 = replace(
    GEMMA_2, name="gemma-3", config_class=Gemma3TextConfig, model_class=Gemma3ForCausalLM
)
