"""Dense models with Llama's names: Llama and Mistral."""

from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from grokquant.families.family import Family, everywhere
from grokquant.families.projections import ATTENTION, MLP

LLAMA = Family("llama", LlamaConfig, LlamaForCausalLM, everywhere(ATTENTION | MLP))
MISTRAL = Family("mistral", MistralConfig, MistralForCausalLM, everywhere(ATTENTION | MLP))
