"""Grok-1: names as SGLang, vLLM and llama.cpp's converter read them."""

from grokquant.families.family import Family, everywhere
from grokquant.families.grok_model import Grok1Config, Grok1ForCausalLM
from grokquant.families.projections import ATTENTION
from grokquant.sources.grok_config import model_fields

GROK_1 = Family(
    name="grok-1",
    config_class=Grok1Config,
    model_class=Grok1ForCausalLM,
    matrices=everywhere(ATTENTION),
    experts={
        "gate": "block_sparse_moe.experts.{expert}.w1.weight",
        "up": "block_sparse_moe.experts.{expert}.w3.weight",
        "down": "block_sparse_moe.experts.{expert}.w2.weight",
    },
    unquantized=("block_sparse_moe.gate",),
    fused="block_sparse_moe.experts",
    fields=model_fields,
)
