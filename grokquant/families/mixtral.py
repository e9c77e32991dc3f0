"""Mixtral: its files say block_sparse_moe where transformers' modules say mlp."""

from transformers import MixtralConfig, MixtralForCausalLM

from grokquant.families.family import Family, everywhere
from grokquant.families.projections import ATTENTION

_EXPERT = r"^(model\.layers\.\d+\.block_sparse_moe\.experts\.\d+)"

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
    aliases={
        r"^(model\.layers\.\d+)\.mlp\.": r"\1.block_sparse_moe.",
        # Quantizers that split transformers 5's fused experts write these names.
        rf"{_EXPERT}\.gate_proj\.": r"\1.w1.",
        rf"{_EXPERT}\.up_proj\.": r"\1.w3.",
        rf"{_EXPERT}\.down_proj\.": r"\1.w2.",
    },
    # The names of transformers 5's modules, fused experts as separate ones.
    gptqmodel_names={
        rf"{_EXPERT}\.w1\.": r"\1.gate_proj.",
        rf"{_EXPERT}\.w3\.": r"\1.up_proj.",
        rf"{_EXPERT}\.w2\.": r"\1.down_proj.",
        r"^(model\.layers\.\d+)\.block_sparse_moe\.": r"\1.mlp.",
    },
)
