"""gpt-oss in bf16: experts with biases, stored transposed and interleaved.

Names of single experts are those that compressed-tensors reads.
"""

from transformers import GptOssConfig, GptOssForCausalLM

from grokquant.families.family import Family, everywhere
from grokquant.families.projections import ATTENTION, EXPERTS

GPT_OSS = Family(
    name="gpt-oss",
    config_class=GptOssConfig,
    model_class=GptOssForCausalLM,
    matrices=everywhere(ATTENTION),
    experts=EXPERTS,
    unquantized=("mlp.router",),
    transposed=True,
    interleaved=True,
    biased=True,
    other_fields=frozenset({"experts_per_token", "initial_context_length"}),  # vLLM reads them
)
