"""Gemma 2 and the text models of Gemma 3."""

from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from grokquant.families.family import Family, everywhere
from grokquant.families.projections import ATTENTION, MLP

GEMMA_2 = Family("gemma-2", Gemma2Config, Gemma2ForCausalLM, everywhere(ATTENTION | MLP))
GEMMA_3 = Family("gemma-3", Gemma3TextConfig, Gemma3ForCausalLM, everywhere(ATTENTION | MLP))
