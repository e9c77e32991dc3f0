"""What a model family is: a table of tensor names plus transformers' classes that run it."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from grokquant.errors import InputError
from grokquant.families.config import usual_fields

# (config, layer) -> names of its quantizable matrices, unit's end -> tensor's end
Matrices = Callable[[PreTrainedConfig, int], Mapping[str, str]]


def everywhere(table: Mapping[str, str]) -> Matrices:
    """The same matrices in every layer."""
    return lambda config, layer: table


@dataclass(frozen=True)
class Family:
    """One model family.

    `matrices` tells what may be quantized in a layer outside its routed experts, in the order of
    the computation, as the ends of unit and checkpoint names. `experts` maps gate, up and down to
    the ends of an expert's checkpoint names, `{expert}` standing for its number; `routed` says
    which layers have experts (of a family that has any). All other tensors (router, norms,
    embedding, biases) are carried over as they are; of these, `unquantized` names the ends of what
    are linear modules in a layer with experts.

    `aliases` are regular expressions with what stands for their matches in the family's own names:
    other names in files, and those of transformers' modules. `fused` is the path of the experts'
    module in a layer; its 3-D parameters hold [out, in] matrices, [in, out] if `transposed`, with
    the rows of gate above those of up, in turns if `interleaved`. `biased` says whether experts
    have biases. `fields` takes from a config.json, given with its path, what makes the model, and
    raises InputError where it does not describe one; `only_own_fields` says that an output's
    config.json holds nothing else. `architecture` is what that calls the model, if not by its
    class. `notice` is a line that whoever uses the family is to see.
    """

    name: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    matrices: Matrices
    experts: Mapping[str, str] = field(default_factory=dict)
    routed: Callable[[PreTrainedConfig, int], bool] = lambda config, layer: True
    unquantized: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    fused: str = "mlp.experts"
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    fields: Callable[[Path, dict], dict] = usual_fields
    only_own_fields: bool = False
    architecture: str | None = None
    notice: str | None = None
    layer_prefix: str = "model.layers.{layer}."

    def config(self, path: Path, content: dict) -> PreTrainedConfig:
        """The transformers config of the config.json at `path`. Raises InputError."""
        fields = self.fields(path, content)
        try:
            return self.config_class(**fields)
        except Exception as error:  # of several libraries, by a value that they do not expect
            raise InputError(f"{path}: {_line(error)}") from None

    def own_config(self, path: Path, content: dict) -> dict:
        """The config.json at `path` as this family's own would be, whatever its architecture and
        fields are called there. Raises InputError."""
        own = self.fields(path, content)
        if not self.only_own_fields:
            own = content | own
        elif "quantization_config" in content:
            own = own | {"quantization_config": content["quantization_config"]}
        names = {"architectures": [self.architecture or self.model_class.__name__]}
        return own | names | {"model_type": self.config_class.model_type}

    def num_experts(self, config: PreTrainedConfig, layer: int) -> int:
        """Routed experts of a layer, 0 where it is dense."""
        return config.num_experts if self.experts and self.routed(config, layer) else 0

    def units(self, config: PreTrainedConfig) -> Iterator[tuple[str, str]]:
        """(unit name, checkpoint tensor name) of every quantizable matrix, layer by layer."""
        for layer in range(config.num_hidden_layers):
            prefix = self.layer_prefix.format(layer=layer)
            for unit, tensor in self.matrices(config, layer).items():
                yield f"layers.{layer}.{unit}", prefix + tensor
            for expert in range(self.num_experts(config, layer)):
                for part, tensor in self.expert_tensors(layer, expert).items():
                    yield f"layers.{layer}.experts.{expert}.{part}", tensor

    def expert_tensors(self, layer: int, expert: int) -> dict[str, str]:
        """Checkpoint names of an expert's matrices by part: gate, up, down."""
        prefix = self.layer_prefix.format(layer=layer)
        return {part: prefix + end.format(expert=expert) for part, end in self.experts.items()}

    def expert_biases(self, layer: int, expert: int) -> dict[str, str]:
        """Checkpoint names of an expert's biases by part; nothing where it has none."""
        if not self.biased:
            return {}
        tensors = self.expert_tensors(layer, expert).items()
        return {part: tensor.removesuffix("weight") + "bias" for part, tensor in tensors}

    def routers(self, config: PreTrainedConfig) -> list[str]:
        """Checkpoint names of the weights of routers, and of other gates before experts."""
        return [
            f"{self.layer_prefix.format(layer=layer)}{module}.weight"
            for layer in range(config.num_hidden_layers)
            if self.num_experts(config, layer)
            for module in self.unquantized
        ]

    def parameter_name(self, layer: nn.Module, index: int, tensor: str) -> str:
        """What the module of decoder layer `index` calls the checkpoint's `tensor`."""
        prefix = self.layer_prefix.format(layer=index)
        names = (name for name, _ in layer.named_parameters())
        return next(name for name in names if self.tensor_name(prefix + name) == tensor)

    def tensor_name(self, name: str) -> str:
        """The family's own name of what a file or transformers calls `name`."""
        for pattern, replacement in self.aliases.items():
            name = re.sub(pattern, replacement, name)
        return name

    def working_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a parameter in a model that works in `dtype`: some stay float32."""
        fixed = getattr(self.model_class, "_keep_in_fp32_modules_strict", None) or ()
        return torch.float32 if any(part in name for part in fixed) else dtype

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers of a model."""
        return cast(nn.ModuleList, model.base_model.layers)

    def experts_of(self, layer: nn.Module) -> Any:
        """The experts module of a decoder layer, fused 3-D weights, or None if it is dense."""
        try:
            return layer.get_submodule(self.fused)
        except AttributeError:
            return None

    def expert_shape(self, layer: nn.Module) -> tuple[int, int]:
        """(inner, hidden) features of the experts of a decoder layer."""
        hidden, inner = self.experts_of(layer).down_proj.shape[1:]
        return (hidden, inner) if self.transposed else (inner, hidden)

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate and up [..., features] as the fused parameters have their rows."""
        if self.interleaved:
            return torch.stack((gate, up), dim=-1).flatten(-2)
        return torch.cat((gate, up), dim=-1)

    def empty_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        """The model with all parameters on the meta device: shapes, no memory.

        Its buffers, such as rotary frequencies, are what transformers computes from the config.
        """
        with torch.device("meta"):
            model = self.model_class(config).eval()
        for module in model.modules():
            buffers = dict(module.named_buffers(recurse=False))
            for name, buffer in buffers.items():
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
            if buffers:
                model._init_weights(module)
        return model


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Puts `value` in the place of the parameter called `name`."""
    parent, last = parameter_parent(module, name)
    setattr(parent, last, nn.Parameter(value, requires_grad=False))


def parameter_parent(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds the parameter called `name`, and its last name there."""
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last
