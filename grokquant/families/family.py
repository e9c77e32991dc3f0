"""What a model family is: a table of tensor names plus transformers' classes that run it."""

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from grokquant.families.config import carried_keys, check_fields, check_sizes, model_keys
from grokquant.families.remote_code import RemoteCode
from grokquant.memory import refused
from grokquant.types import Matrix

# (config, layer) -> names of its quantizable matrices, part -> end of the tensor's name
Matrices = Callable[[PreTrainedConfig, int], Mapping[str, str]]
# Parts that read the same input, whatever the family: the first of each names it.
_SAME_INPUT = (
    ("attention.q", "attention.k", "attention.v", "attention.q_a", "attention.kv_a"),
    ("mlp.gate", "mlp.up"),
    ("shared.gate", "shared.up"),
    ("gate", "up"),
)
_READS = {part: parts[0] for parts in _SAME_INPUT for part in parts}


def everywhere(table: Mapping[str, str]) -> Matrices:
    """`matrices` of a family whose layers all have the same ones."""
    return lambda config, layer: table


@dataclass(frozen=True)
class Family:
    """One model family.

    Quantizable matrices: `matrices` gives those of a layer outside its routed experts, in the order
    of computation. `experts` maps gate, up and down to the suffixes of an expert's checkpoint
    names, with `{expert}` for its number; `routed` tells which layers have experts. All other
    tensors (router, norms, embedding, biases) are carried over unchanged; `unquantized` are the
    suffixes of those that belong to linear modules in a layer with experts.

    Names: `aliases` maps regular expressions to the family's own names; they match other names in
    files and those of transformers' modules. `gptqmodel_names` maps the family's own names to those
    that GPTQModel looks for, where they differ. `fused` is the path of the experts' module in a
    layer. Its 3-D parameters, which transformers fuses, hold for each expert

        gate_up_proj   [2 * inner, hidden]   rows of gate, then rows of up; g u g u if `interleaved`
        down_proj      [hidden, inner]       both transposed if `transposed`

    and biases if `biased`. `router_norm` is the module of a layer whose outputs router and experts
    read. The sum of the experts' gated outputs is added to the residual, after the module
    `mixture_norm` if that has a name; it is None if the layer does more with the sum.

    config.json: `fields` picks the fields that define the model, given the file's path and content;
    it raises InputError if they describe no model of the family. An output's config.json has the
    fields of the config class and `other_fields`, which are understood here or read by other
    programs; with `only_own_fields` it has what `fields` returns. `architecture` is the model's
    name there, by default that of its class. `engine_fields` gives what engines also ask of an
    output's config.json, though the model does not. `remote_code` is the file that lets
    transformers alone open an output, None where it needs none or there is none. `notice` is a line
    to show to every user of the family.
    """

    name: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    matrices: Matrices
    experts: Mapping[str, str] = field(default_factory=dict)
    routed: Callable[[PreTrainedConfig, int], bool] = lambda config, layer: True
    unquantized: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    gptqmodel_names: Mapping[str, str] = field(default_factory=dict)
    fused: str = "mlp.experts"
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    router_norm: str = "post_attention_layernorm"
    mixture_norm: str | None = ""
    fields: Callable[[Path, dict], dict] = check_fields
    only_own_fields: bool = False
    other_fields: frozenset[str] = frozenset()
    architecture: str | None = None
    engine_fields: Callable[[PreTrainedConfig], dict] = lambda config: {}
    remote_code: RemoteCode | None = None
    notice: str | None = None
    layer_prefix: str = "model.layers.{layer}."

    def config(self, path: Path, content: dict) -> PreTrainedConfig:
        """The transformers config for the `content` of the config.json at `path`.

        Raises InputError.
        """
        fields = self.fields(path, content)
        known = model_keys(self.config_class)
        given = {key: value for key, value in fields.items() if key in known}
        with refused(str(path)):  # transformers checks values, too
            config = self.config_class(**deepcopy(given))  # it changes what it is given
        check_sizes(path, config)
        return config

    def own_config(self, path: Path, content: dict) -> dict:
        """The `content` of a config.json in this family's own form, with its own names for the
        architecture and the fields. Raises InputError."""
        own = self.fields(path, content)
        if not self.only_own_fields:
            left_out = self.left_out(content)
            own = {key: value for key, value in (content | own).items() if key not in left_out}
        elif "quantization_config" in content:
            own = own | {"quantization_config": content["quantization_config"]}
        names = {"architectures": [self.architecture or self.model_class.__name__]}
        return own | names | {"model_type": self.config_class.model_type}

    def left_out(self, content: dict) -> list[str]:
        """The keys of a config.json that are not part of an output's."""
        known = carried_keys(self.config_class) | self.other_fields
        return [key for key in content if key not in known]

    def num_experts(self, config: PreTrainedConfig, layer: int) -> int:
        """Routed experts of a layer, 0 where it is dense."""
        return config.num_experts if self.experts and self.routed(config, layer) else 0

    def units(self, config: PreTrainedConfig) -> Iterator[Matrix]:
        """Every quantizable matrix, layer by layer."""
        for layer in range(config.num_hidden_layers):
            prefix = self.layer_prefix.format(layer=layer)
            for part, end in self.matrices(config, layer).items():
                yield _matrix(f"layers.{layer}", prefix + end, layer, part)
            for expert in range(self.num_experts(config, layer)):
                for part, tensor in self.expert_tensors(layer, expert).items():
                    yield _matrix(f"layers.{layer}.experts.{expert}", tensor, layer, part, expert)

    def expert_tensors(self, layer: int, expert: int) -> dict[str, str]:
        """Checkpoint names of an expert's matrices by part: gate, up, down."""
        prefix = self.layer_prefix.format(layer=layer)
        return {part: prefix + end.format(expert=expert) for part, end in self.experts.items()}

    def expert_biases(self, layer: int, expert: int) -> dict[str, str]:
        """Checkpoint names of an expert's biases by part; empty if it has none."""
        if not self.biased:
            return {}
        tensors = self.expert_tensors(layer, expert).items()
        return {part: tensor.removesuffix("weight") + "bias" for part, tensor in tensors}

    def routers(self, config: PreTrainedConfig) -> list[str]:
        """Checkpoint names of router weights, and of other gates in front of experts."""
        return [
            f"{self.layer_prefix.format(layer=layer)}{module}.weight"
            for layer in range(config.num_hidden_layers)
            if self.num_experts(config, layer)
            for module in self.unquantized
        ]

    def router(self, config: PreTrainedConfig, layer: int) -> tuple[str, str] | None:
        """Checkpoint names of a layer's router and of the norm before it; None if it is dense."""
        if not self.num_experts(config, layer):
            return None
        prefix = self.layer_prefix.format(layer=layer)
        return f"{prefix}{self.unquantized[0]}.weight", f"{prefix}{self.router_norm}.weight"

    def parameter_name(self, layer: nn.Module, index: int, tensor: str) -> str:
        """The name of the parameter in decoder layer `index` that holds a checkpoint tensor."""
        prefix = self.layer_prefix.format(layer=index)
        names = (name for name, _ in layer.named_parameters())
        return next(name for name in names if self.tensor_name(prefix + name) == tensor)

    def tensor_name(self, name: str) -> str:
        """The family's own name for the tensor that a file or transformers calls `name`."""
        return _replaced(name, self.aliases)

    def gptqmodel_name(self, name: str) -> str:
        """The name that GPTQModel looks for, of the tensor that the family calls `name`."""
        return _replaced(name, self.gptqmodel_names)

    def working_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a parameter in a model that computes in `dtype`: some stay float32."""
        fixed = getattr(self.model_class, "_keep_in_fp32_modules_strict", None) or ()
        return torch.float32 if any(part in name for part in fixed) else dtype

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers of a model."""
        return cast(nn.ModuleList, model.base_model.layers)

    def experts_of(self, layer: nn.Module) -> Any:
        """The module of a decoder layer's experts (fused 3-D weights), or None if it is dense."""
        try:
            return layer.get_submodule(self.fused)
        except AttributeError:
            return None

    def expert_shape(self, layer: nn.Module) -> tuple[int, int]:
        """(inner, hidden) features of the experts of a decoder layer."""
        hidden, inner = self.experts_of(layer).down_proj.shape[1:]
        return (hidden, inner) if self.transposed else (inner, hidden)

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate and up [..., inner] as one [..., 2 * inner], in the order of fused parameters."""
        if self.interleaved:
            return torch.stack((gate, up), dim=-1).flatten(-2)
        return torch.cat((gate, up), dim=-1)

    def empty_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        """The model with all parameters on the meta device, where they take no memory.

        Its buffers, such as rotary frequencies, have the values that transformers computes.
        """
        with torch.device("meta"):
            model = self.model_class(config).eval()
        for module in model.modules():
            buffers = dict(module.named_buffers(recurse=False))
            for name, buffer in buffers.items():
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
            if buffers:
                model._init_weights(module)  # fills buffers from the config
        return model


def _replaced(name: str, replacements: Mapping[str, str]) -> str:
    for pattern, replacement in replacements.items():
        name = re.sub(pattern, replacement, name)
    return name


def _matrix(place: str, tensor: str, layer: int, part: str, expert: int | None = None) -> Matrix:
    return Matrix(f"{place}.{part}", tensor, layer, part, _READS.get(part, part), expert)


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replaces the parameter called `name` by `value`."""
    parent, last = parameter_parent(module, name)
    setattr(parent, last, nn.Parameter(value, requires_grad=False))


def parameter_parent(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds the parameter called `name`, and the parameter's name in it."""
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last
