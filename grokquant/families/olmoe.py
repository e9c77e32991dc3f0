"""OLMoE: every layer has experts."""

from transformers import OlmoeConfig, OlmoeForCausalLM

from grokquant.families.family import Family, everywhere
from grokquant.families.projections import ATTENTION, EXPERTS

OLMOE = Family(
    name="olmoe",
    config_class=OlmoeConfig,
    model_class=OlmoeForCausalLM,
    matrices=everywhere(ATTENTION),
    experts=EXPERTS,
    unquantized=("mlp.gate",),
)
