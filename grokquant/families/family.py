"""What a model family is: a table of tensor names plus transformers' classes that run it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """One model family.

    `matrices` maps the ends of unit names to the ends of checkpoint names within a layer, for
    everything that may be quantized; `{expert}` stands for each expert in turn. All other tensors
    (router, norms, embedding) are carried over as they are. The three expert matrices are named
    gate, up and down. `router` and `experts` are the modules' names within a layer. `fields`
    takes from a config.json, given with its path, what makes the model, and raises InputError
    where it does not describe one; nothing else of a config.json reaches transformers.
    """

    name: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    matrices: Mapping[str, str]
    router: str
    experts: str
    fields: Callable[[Path, dict], dict]
    layer_prefix: str = "model.layers.{layer}."

    def config(self, path: Path, content: dict) -> PreTrainedConfig:
        """The transformers config of the config.json at `path`. Raises InputError."""
        return self.config_class(**self.fields(path, content))

    def units(self, config: PreTrainedConfig) -> Iterator[tuple[str, str]]:
        """(unit name, checkpoint tensor name) of every quantizable matrix, layer by layer."""
        for layer in range(config.num_hidden_layers):
            prefix = self.layer_prefix.format(layer=layer)
            for unit, tensor in self.matrices.items():
                if "{expert}" not in unit:
                    yield f"layers.{layer}.{unit}", prefix + tensor
            for expert in range(config.num_local_experts):
                for unit, tensor in self.matrices.items():
                    if "{expert}" in unit:
                        end = unit.format(expert=expert), tensor.format(expert=expert)
                        yield f"layers.{layer}.{end[0]}", prefix + end[1]

    def expert_tensors(self, layer: int, expert: int) -> dict[str, str]:
        """Checkpoint names of an expert's matrices by part: gate, up, down."""
        prefix = self.layer_prefix.format(layer=layer)
        return {
            unit.rpartition(".")[2]: prefix + tensor.format(expert=expert)
            for unit, tensor in self.matrices.items()
            if "{expert}" in unit
        }

    def routers(self, config: PreTrainedConfig) -> list[str]:
        """Checkpoint names of the routers' weights."""
        layers = range(config.num_hidden_layers)
        return [f"{self.layer_prefix.format(layer=n)}{self.router}.weight" for n in layers]

    def working_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a parameter in a model that works in `dtype`: some stay float32."""
        fixed = getattr(self.model_class, "_keep_in_fp32_modules_strict", None) or ()
        return torch.float32 if any(part in name for part in fixed) else dtype

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers of a model."""
        return cast(nn.ModuleList, model.base_model.layers)

    def experts_of(self, layer: nn.Module) -> Any:
        """The experts module of a decoder layer: a transformers class, fused 3-D weights."""
        return layer.get_submodule(self.experts)

    def empty_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        """The model with all parameters on the meta device: shapes, no memory."""
        with torch.device("meta"):
            return self.model_class(config).eval()


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Puts `value` in the place of the parameter called `name`."""
    parent, last = parameter_parent(module, name)
    setattr(parent, last, nn.Parameter(value, requires_grad=False))


def parameter_parent(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds the parameter called `name`, and its last name there."""
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last
