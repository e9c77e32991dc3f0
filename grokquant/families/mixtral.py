"""Mixtral: its files say block_sparse_moe where transformers' modules say mlp."""

from transformers import MixtralConfig, MixtralForCausalLM

from grokquant.families.family import Family, everywhere
from grokquant.families.projections import ATTENTION

MIXTRAL = Family(
    name="mixtral",
    config_class=MixtralConfig,
    model_class=MixtralForCausalLM,
    matrices=everywhere(ATTENTION),
    experts={
        "gate": "block_sparse_moe.experts.{expert}.w1.weight",
        "up": "block_sparse_moe.experts.{expert}.w3.weight",
        "down": "block_sparse_moe.experts.{expert}.w2.weight",
    },
    unquantized=("block_sparse_moe.gate",),
    aliases={r"^(model\.layers\.\d+)\.mlp\.": r"\1.block_sparse_moe."},
)
