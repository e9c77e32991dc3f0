"""Gemma 2 and the text models of Gemma 3."""

from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from grokquant.families.family import Family, everywhere
from grokquant.families.projections import ATTENTION, MLP

_MATRICES = everywhere(ATTENTION | MLP)
_NORM = "post_feedforward_layernorm"

GEMMA_2 = Family(
    "gemma-2", Gemma2Config, Gemma2ForCausalLM, _MATRICES, mlp_norm=_NORM, norm_offset=1.0
)
GEMMA_3 = Family(
    "gemma-3", Gemma3TextConfig, Gemma3ForCausalLM, _MATRICES, mlp_norm=_NORM, norm_offset=1.0
)
