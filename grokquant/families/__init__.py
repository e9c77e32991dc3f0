"""Model families: how tensors are named and how a block runs. A new one is a line in FAMILIES."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from grokquant.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from grokquant.families.family import Family
    from grokquant.types import Source


class _Families(Mapping[str, "Family"]):
    """Families by architecture. Each is imported, with its classes of transformers, when read."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places

    def __getitem__(self, architecture: str) -> "Family":
        module, name = self._places[architecture].split(":")
        return getattr(import_module(f"grokquant.families.{module}"), name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


# `architectures` of a config.json -> "module:NAME" of the Family.
FAMILIES = _Families(
    {
        "Grok1ForCausalLM": "grok:GROK_1",
        "Grok1ModelForCausalLM": "grok:GROK_1",
        "GrokForCausalLM": "grok:GROK_1",
        "MixtralForCausalLM": "mixtral:MIXTRAL",
        "Qwen2MoeForCausalLM": "qwen_moe:QWEN2_MOE",
        "Qwen3MoeForCausalLM": "qwen_moe:QWEN3_MOE",
        "OlmoeForCausalLM": "olmoe:OLMOE",
        "DeepseekV2ForCausalLM": "deepseek:DEEPSEEK_V2",
        "GptOssForCausalLM": "gpt_oss:GPT_OSS",
        "LlamaForCausalLM": "llama:LLAMA",
        "MistralForCausalLM": "llama:MISTRAL",
        "Gemma2ForCausalLM": "gemma:GEMMA_2",
        "Gemma3ForCausalLM": "gemma:GEMMA_3",
    }
)


def family_of(source: "Source") -> "Family":
    """The family of an opened checkpoint, by its `architectures`. Raises InputError."""
    match source.config.get("architectures"):
        case [str(name)] if name in FAMILIES:
            return _grok_2_or(FAMILIES[name], source)
        case [str(name)]:
            from grokquant.families.derived import derived_family

            if (family := derived_family(source)) is not None:
                return family
            found = f"the architecture {name!r} is not known"
        case _:
            found = "architectures must be a list of one name"
    if isinstance(source.config.get("text_config"), dict):
        found += "; transformers has no multimodal model of this name and model_type"
    from transformers import __version__

    known = f"known: {', '.join(FAMILIES)}, and language models of transformers {__version__}"
    raise InputError(
        f"{source.path / 'config.json'}: {found} ({known}); docs/extending.md shows how to add a "
        "family in one file"
    )


def config_of(source: "Source") -> "PreTrainedConfig":
    """The config of an opened checkpoint as transformers has it; no model is made. Raises
    InputError."""
    names = source.config.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] not in FAMILIES:
        from grokquant.families.derived import derived_config

        if (config := derived_config(source)) is not None:
            return config
    return family_of(source).config(source.path / "config.json", source.config)


def _grok_2_or(family: "Family", source: "Source") -> "Family":
    """Grok-2 has Grok-1's architecture and says `residual_moe`."""
    if family.name == "grok-1" and source.config.get("residual_moe") is True:
        from grokquant.families.grok2 import GROK_2

        return GROK_2
    return family
