"""Model families: how tensors are named and how a block runs. A new one is a line in FAMILIES."""

from grokquant.errors import InputError
from grokquant.families.deepseek import DEEPSEEK_V2
from grokquant.families.family import Family
from grokquant.families.gemma import GEMMA_2, GEMMA_3
from grokquant.families.gpt_oss import GPT_OSS
from grokquant.families.grok import GROK_1
from grokquant.families.grok2 import GROK_2, is_grok_2
from grokquant.families.llama import LLAMA, MISTRAL
from grokquant.families.mixtral import MIXTRAL
from grokquant.families.olmoe import OLMOE
from grokquant.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from grokquant.types import Source

FAMILIES: dict[str, Family] = {
    "Grok1ForCausalLM": GROK_1,
    "Grok1ModelForCausalLM": GROK_1,
    "GrokForCausalLM": GROK_1,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "OlmoeForCausalLM": OLMOE,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "GptOssForCausalLM": GPT_OSS,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Gemma2ForCausalLM": GEMMA_2,
    "Gemma3ForCausalLM": GEMMA_3,
}


def family_of(source: Source) -> Family:
    """The family of an opened checkpoint, by its `architectures`. Raises InputError."""
    match source.config.get("architectures"):
        case [str(name)] if name in FAMILIES:
            family = FAMILIES[name]
            return GROK_2 if family is GROK_1 and is_grok_2(source.config) else family
        case [str(name)]:
            found = f"{name!r} is not known"
        case _:
            found = "is not given as a list of one name"
    if isinstance(source.config.get("text_config"), dict):
        found += ", a text model inside one of several media is not read"
    raise InputError(
        f"{source.path / 'config.json'}: the architecture {found} (known: {', '.join(FAMILIES)})"
    )
