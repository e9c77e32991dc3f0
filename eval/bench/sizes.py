"""What models take in memory, planned from headers of real shapes: the table of docs/memory.md.

    python eval/bench/sizes.py [NAME ...]

Makes each model from a configuration, as a sparse file of the right size, and plans it under the
recipes that `grokquant quantize MODEL` stands for. Prints Markdown.
"""

import argparse
import json
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

import grokquant
from grokquant.errors import InputError
from grokquant.families.grok_model import Grok1Config
from grokquant.humanize import size

_LENGTH = struct.Struct("<Q")  # of the header, before it
_BF16 = 2  # bytes

_MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "Llama 2 7B": lambda: LlamaConfig(),
    "Llama 2 70B": lambda: LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "OLMoE 1B-7B": lambda: OlmoeConfig(intermediate_size=1024),
    "Qwen3 30B-A3B": lambda: Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        norm_topk_prob=True,
    ),
    "Mixtral 8x7B": lambda: MixtralConfig(),
    "Mixtral 8x22B": lambda: MixtralConfig(
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=56,
        num_attention_heads=48,
        num_key_value_heads=8,
    ),
    "Qwen3 235B-A22B": lambda: Qwen3MoeConfig(
        hidden_size=4096,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        norm_topk_prob=True,
    ),
    "Grok-1": lambda: Grok1Config(),
}
# Heads of the columns, and what `quantize MODEL` is asked for.
_GOALS: dict[str, dict] = {
    "int8": {"bits": 8, "format": "compressed-tensors"},
    "Q6_K": {"grid": "q6_k"},
    "int4": {"bits": 4},
    "Q4_K": {"grid": "q4_k"},
    "int3": {"bits": 3, "format": "gptq"},
    "Q2_K": {"grid": "q2_k"},
}


def write_hollow(config: PreTrainedConfig, directory: Path) -> int:
    """A model of bf16 zeros that take no room on disk; returns the bytes of its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    header = {}
    end = 0
    for name, weight in model.state_dict().items():
        start = end
        end = start + weight.numel() * _BF16
        shape = list(weight.shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        file.truncate(_LENGTH.size + len(text) + end)
    return end


def cells(model: Path) -> Iterator[str]:
    """The planned size of the result for each goal."""
    for name, goal in _GOALS.items():
        try:
            recipe = grokquant.recipe_for(model, **goal)
            tokenizer = "none" if recipe.output.format == "gguf" else "source"
            output = recipe.output.model_copy(update={"tokenizer": tokenizer})
            plan = grokquant.plan(recipe.model_copy(update={"output": output}))
            yield size(plan.output_bytes)
        except InputError as error:
            print(f"{model.name}: {name}: {error}", file=sys.stderr)
            yield "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(_MODELS), metavar="NAME")
    names = parser.parse_args().names
    heads = ["Model", "bf16", *_GOALS]
    print("|".join(("", *heads, "")))
    print("|".join(("", "---", *["--:"] * (len(heads) - 1), "")))
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            model = Path(work, name)
            model.mkdir()
            stored = write_hollow(_MODELS[name](), model)
            print("|".join(("", name, size(stored), *cells(model), "")), flush=True)


if __name__ == "__main__":
    main()
