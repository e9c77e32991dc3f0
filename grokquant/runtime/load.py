"""Loading a whole checkpoint into memory as a transformers model, whatever its form on disk."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
    for index, layer in enumerate(family.layers(model)):
        _fill_experts(checkpoint, index, layer, device, dtype)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = tensors[family.tensor_name(name)].read()
            set_parameter(model, name, value.to(device, family.working_dtype(name, dtype)))
    model.tie_weights()
    torch.nn.Module.to(model, device)  # buffers
    if checkpoint.num_experts:
        model.set_experts_implementation("eager")
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def _fill_experts(
    checkpoint: Checkpoint, index: int, layer: Any, device: torch.device, dtype: torch.dtype
) -> None:
    """Fuses the experts of a layer to the parameters of its own class, expert by expert."""
    family, config = checkpoint.family, checkpoint.config
    for expert in range(family.num_experts(config, index)):
        experts = family.experts_of(layer)
        values = _fused(checkpoint, family.expert_tensors(index, expert), "proj")
        if family.biased:
            values |= _fused(checkpoint, family.expert_biases(index, expert), "proj_bias")
        for name, value in values.items():
            if expert == 0:
                shape = getattr(experts, name).shape
                set_parameter(experts, name, torch.empty(shape, dtype=dtype, device=device))
            getattr(experts, name)[expert] = value


def _fused(checkpoint: Checkpoint, names: dict[str, str], end: str) -> dict[str, Tensor]:
    """The matrices or biases of an expert as its class has them, by the parameters' names."""
    family = checkpoint.family
    part = {key: checkpoint.source.tensors[name].read() for key, name in names.items()}
    turned = {key: value.T if value.ndim == 2 else value for key, value in part.items()}
    gate_up, down = family.join(turned["gate"], turned["up"]), turned["down"]  # (.., out)
    if not family.transposed and gate_up.ndim == 2:
        gate_up, down = gate_up.T, down.T
    return {f"gate_up_{end}": gate_up, f"down_{end}": down}
