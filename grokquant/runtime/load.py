"""Loading a whole checkpoint into memory as a transformers model, whatever its form on disk."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.devices import device_of
from grokquant.families.family import set_parameter
from grokquant.tokenizer import load_tokenizer


def load(
    path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model in `dtype` and its tokenizer (None if there is none beside it).

    `path` is a release, a bf16 Hugging Face directory or a quantized output; `toy` names the
    embedded toy. Quantized matrices are multiplied out. Raises InputError.
    """
    place = device_of(device)
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint, place, dtype)
    has_tokenizer = bool(checkpoint.source.tokenizer_files)
    return model, load_tokenizer(checkpoint) if has_tokenizer else None


@torch.no_grad()
def build_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """The family's own model class with every parameter filled, tensor by tensor."""
    family, tensors = checkpoint.family, checkpoint.source.tensors
    model = family.empty_model(checkpoint.config)
    for name, _ in list(model.named_parameters()):
        if f".{family.experts}." not in name:
            value = tensors[name].read()
            set_parameter(model, name, value.to(device, family.working_dtype(name, dtype)))
    for index, layer in enumerate(family.layers(model)):
        _fill_experts(checkpoint, index, family.experts_of(layer), device, dtype)
    model.tie_weights()
    model.set_experts_implementation("eager")
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def _fill_experts(
    checkpoint: Checkpoint, index: int, experts: Any, device: torch.device, dtype: torch.dtype
) -> None:
    """Fuses the experts of a layer: gate over up, then down, each [experts, out, in]."""
    gate_up = torch.empty(experts.gate_up_proj.shape, dtype=dtype, device=device)
    down = torch.empty(experts.down_proj.shape, dtype=dtype, device=device)
    for expert in range(checkpoint.config.num_local_experts):
        names = checkpoint.family.expert_tensors(index, expert)
        part = {key: checkpoint.source.tensors[name].read() for key, name in names.items()}
        half = part["gate"].shape[0]
        gate_up[expert, :half], gate_up[expert, half:] = part["gate"], part["up"]
        down[expert] = part["down"]
    set_parameter(experts, "gate_up_proj", gate_up)
    set_parameter(experts, "down_proj", down)
