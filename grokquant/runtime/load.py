"""Loads a whole checkpoint of any format into memory as a transformers model."""

from pathlib import Path
from warnings import warn

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.devices import device_of
from grokquant.errors import InputError
from grokquant.families.family import set_parameter, stored_values, tie_weights
from grokquant.files.json_objects import read_json_object
from grokquant.memory import refused
from grokquant.recipe.schema import parse_size
from grokquant.runtime.packed import PackedMatrix, pack_model
from grokquant.sources.release import NAME as RELEASE
from grokquant.text.tokenizer import load_tokenizer


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    packed: bool | None = None,
    max_memory: int | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model in `dtype` and its tokenizer (None if there is none beside it).

    `path` is a release, a bf16 Hugging Face directory or a quantized output; `toy` names the
    embedded toy. Quantized matrices stay `packed` and are read when they are first used, or they
    are all dequantized at once. By default only those of a release are dequantized, which xAI's
    code rounds to bfloat16. Of packed ones at most `max_memory` is held (bytes, or text such as
    "16GB"); matrices used longest ago are dropped, and read again when they are needed. Raises
    InputError.
    """
    place = device_of(device)
    limit = _limit(max_memory)
    checkpoint = open_checkpoint(path)
    for note in checkpoint.source.notes:
        warn(note, stacklevel=2)
    if packed is None:
        packed = limit is not None or checkpoint.source.kind != RELEASE
    model = build_model(checkpoint, place, dtype, packed, limit)
    has_tokenizer = bool(checkpoint.source.tokenizer_files)
    return model, load_tokenizer(checkpoint) if has_tokenizer else None


def build_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    packed: bool = False,
    limit: int | None = None,
) -> PreTrainedModel:
    """The family's own model class with every parameter filled, tensor by tensor."""
    model = checkpoint.family.empty_model(checkpoint.config, dtype)
    if packed:
        pack_model(model, checkpoint, dtype, limit)
    fill_model(model, checkpoint, dtype, device)
    tie_weights(model)
    nn.Module.to(model, device)  # buffers
    if checkpoint.num_experts:
        model.set_experts_implementation("eager")
    model.generation_config = _generation_config(checkpoint, model)
    return model


def _limit(max_memory: int | str | None) -> int | None:
    if max_memory is None or isinstance(max_memory, int):
        return max_memory
    try:
        return parse_size(max_memory)
    except ValueError as error:
        raise InputError(str(error), "max_memory") from None


def _generation_config(checkpoint: Checkpoint, model: PreTrainedModel) -> GenerationConfig:
    """End tokens and sampling as the file beside the model has them, else as config.json."""
    path = checkpoint.source.beside.get("generation_config.json")
    if path is None:
        return GenerationConfig.from_model_config(model.config)
    content = read_json_object(path)
    with refused(str(path)):
        return GenerationConfig.from_dict(content)


@torch.no_grad()
def fill_model(
    model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> None:
    """Reads all parameters and packed matrices in place, tensor by tensor; those without memory are
    allocated on `device`."""
    family = checkpoint.family
    tensors = checkpoint.source.tensors
    for index, layer in enumerate(family.layers(model)):
        _fill_experts(checkpoint, index, layer, device, dtype)
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            module.open(device)
    for name, parameter in list(stored_values(model)):
        if not family.holds(tensors, name):
            continue  # part of fused experts
        kind = family.working_dtype(name, dtype) if parameter.is_floating_point() else None
        if not parameter.is_meta and kind in (parameter.dtype, None):
            parameter.copy_(family.read(tensors, name))
        else:
            place = device if parameter.is_meta else parameter.device
            set_parameter(model, name, family.read(tensors, name).to(place, kind))


def absent_parameters(model: PreTrainedModel, checkpoint: Checkpoint) -> list[str]:
    """Parameters for which a checkpoint has nothing, such as the head of a classifier.

    Those that are tied to others need nothing.
    """
    family = checkpoint.family
    experts = [family.experts_of(layer) for layer in family.layers(model)]
    fused = {id(p) for module in experts if module is not None for p in module.parameters()}
    return [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in fused
        and name not in model.all_tied_weights_keys
        and not family.holds(checkpoint.source.tensors, name)
    ]


def _fill_experts(
    checkpoint: Checkpoint, index: int, layer: nn.Module, device: torch.device, dtype: torch.dtype
) -> None:
    """Fuses the experts of a layer into the parameters of its class, expert by expert."""
    family = checkpoint.family
    experts = family.experts_of(layer)
    if experts is None:
        return
    count = family.num_experts(checkpoint.config, index)
    held = dict(experts.named_parameters(recurse=False))
    names_of = {"proj": family.expert_tensors}
    if family.biased:
        names_of["proj_bias"] = family.expert_biases
    for end, names in names_of.items():
        if f"down_{end}" not in held:
            continue  # packed
        for name in (f"gate_up_{end}", f"up_{end}", f"down_{end}"):
            if name in held and held[name].is_meta:
                value = torch.empty_like(held[name], dtype=dtype, device=device)
                set_parameter(experts, name, value)
        for expert in range(count):
            for name, value in _fused(checkpoint, names(index, expert), end).items():
                getattr(experts, name)[expert] = value


def _fused(checkpoint: Checkpoint, names: dict[str, str], end: str) -> dict[str, Tensor]:
    """The matrices or biases of an expert as its class has them, by the parameters' names."""
    family = checkpoint.family
    part = {key: checkpoint.source.tensors[name].read() for key, name in names.items()}
    turned = {key: value.T if value.ndim == 2 else value for key, value in part.items()}
    gate_up = family.join(turned.get("gate"), turned["up"])  # (.., out)
    down = turned["down"]
    if not family.transposed and gate_up.ndim == 2:
        gate_up = gate_up.T
        down = down.T
    first = f"gate_up_{end}" if "gate" in part else f"up_{end}"
    return {first: gate_up, f"down_{end}": down}
