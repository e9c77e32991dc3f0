"""Grok-1: names as SGLang, vLLM and llama.cpp's converter read them."""

from grokquant.families.family import Family
from grokquant.families.grok_model import Grok1Config, Grok1ForCausalLM
from grokquant.sources.grok_config import model_fields

GROK_1 = Family(
    name="grok-1",
    config_class=Grok1Config,
    model_class=Grok1ForCausalLM,
    matrices={
        "attention.q": "self_attn.q_proj.weight",
        "attention.k": "self_attn.k_proj.weight",
        "attention.v": "self_attn.v_proj.weight",
        "attention.o": "self_attn.o_proj.weight",
        "experts.{expert}.gate": "block_sparse_moe.experts.{expert}.w1.weight",
        "experts.{expert}.up": "block_sparse_moe.experts.{expert}.w3.weight",
        "experts.{expert}.down": "block_sparse_moe.experts.{expert}.w2.weight",
    },
    router="block_sparse_moe.gate",
    experts="block_sparse_moe.experts",
    fields=model_fields,
)
