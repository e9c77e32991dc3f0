"""gpt-oss in bf16: experts with biases, whose files hold them transposed and interleaved.

Per-expert names are those of the checkpoints that compressed-tensors knows.
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
)
