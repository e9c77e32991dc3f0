"""Families that nobody has written down: derived from transformers' own model and its names.

    config.json      architectures: [Qwen3NextForCausalLM]
    transformers     the model on the meta device, and the names of its tensors in files
    = a table        decoder layers, their linear modules, experts, shared experts, routers

Only code of the installed transformers is used, never any beside the weights.
"""

import re
from collections.abc import Container, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from grokquant.families.config import check_bounds, defines_the_model
from grokquant.families.derived_table import Table, stacks_in, table_of, takes_turns
from grokquant.families.family import FUSED_PARTS, Family, FusedExperts
from grokquant.families.stored_names import Shapes
from grokquant.memory import refused
from grokquant.types import Source, TensorRef

_WHOLE = (
    "the layers of this model depend on more than the layer before them: to calibrate or evaluate "
    "it, all of it has to fit into memory"
)
# Fields that count the layers for multi-token prediction, which files number after all others.
_FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
_MOST_FURTHER = 64  # far above any model
# Models whose layers add what attention.o and down(act(gate) * up) give to the residual, and do
# nothing else with these.
_PLAIN = frozenset({"qwen2", "qwen3", "smollm3"})
_UNUSED = ("auto_map",)  # names code beside the weights


@dataclass(frozen=True)
class DerivedFamily(Family):
    """A family that is made for one model; `table` takes the place of names and patterns."""

    table: Table = field(kw_only=True, repr=False)

    def config(self, path: Path, content: dict) -> PreTrainedConfig:
        with refused(str(path)):
            return _config_of(self.config_class, content)

    def left_out(self, content: dict) -> list[str]:
        return [key for key in _UNUSED if key in content]

    def num_layers(self, config: PreTrainedConfig) -> int:
        return len(self.table.layers)

    def num_experts(self, config: PreTrainedConfig, layer: int) -> int:
        experts = self.table.layers[layer].experts
        return experts.count if experts else 0

    def matrix_tensors(self, config: PreTrainedConfig, layer: int) -> dict[str, str]:
        return dict(self.table.layers[layer].matrices)

    def reads(self, layer: int, part: str) -> str:
        return self.table.layers[layer].reads.get(part, super().reads(layer, part))

    def attention_output(self, config: PreTrainedConfig, layer: int) -> str:
        matrices = self.table.layers[layer].matrices
        attention = [part for part in matrices if part.startswith("attention.")]
        outputs = [part for part in attention if part.rpartition(".")[2] in ("o", "out", "dense")]
        return matrices[(outputs or attention or list(matrices))[-1]]

    def layer_of(self, tensor: str) -> int | None:
        return self.table.layer_of.get(tensor)

    def expert_tensors(self, layer: int, expert: int) -> dict[str, str]:
        experts = self.table.layers[layer].experts
        return {part: names[expert] for part, names in experts.tensors.items()} if experts else {}

    def expert_biases(self, layer: int, expert: int) -> dict[str, str]:
        experts = self.table.layers[layer].experts
        return {part: names[expert] for part, names in experts.biases.items()} if experts else {}

    @property
    def names_experts(self) -> bool:
        return any(layer.experts.own_names for layer in self.table.layers if layer.experts)

    @property
    def joins(self) -> bool:
        table = self.table
        unused = any(layer.experts.unused for layer in table.layers if layer.experts)
        reshaped = bool(self.turned or self.stacked)
        return bool(table.joined) or reshaped or table.own_linears or unused

    @property
    def runs_experts(self) -> bool:
        experts = [layer.experts for layer in self.table.layers if layer.experts]
        return self.streams and all(e.takes_turns for e in experts)

    def routers(self, config: PreTrainedConfig) -> list[str]:
        """The weights of all linear modules that are no matrices, as their model calls them."""
        layers = self.table.layers
        others = [f"{layer.path}.{other}" for layer in layers for other in layer.others]
        return [f"{path}.weight" for path in (*others, *self.table.outside)]

    def module_weight(self, tensor: str) -> str:
        return self.table.module_names.get(tensor, tensor)

    def router(self, config: PreTrainedConfig, layer: int) -> tuple[str, str] | None:
        return None  # which norm comes before it is not derived

    def module_prefix(self, layer: int) -> str:
        return self.table.layers[layer].path + "."

    def working_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if name in self.table.wide else super().working_dtype(name, dtype)

    def tensor_name(self, name: str) -> str:
        table = self.table
        for known in table.stored.with_and_without_prefix(name):
            if known in table.shapes or known in table.fused:
                return known
            if known in table.names:
                return table.names[known]
            on_the_way = table.stored.of_model(known)
            if on_the_way in table.on_the_way:
                return table.on_the_way[on_the_way]
            if on_the_way in table.names:
                return table.names[on_the_way]
            if on_the_way in table.fused:
                return on_the_way
        return name

    def read(self, tensors: Mapping[str, TensorRef], name: str) -> Tensor:
        if name in self.table.joined:
            conversion = self.table.joined[name]
            return self.table.stored.joined(name, conversion, lambda tensor: tensors[tensor].read())
        if name in self.table.fused and name not in tensors:
            return self._stacked(tensors, self.table.fused[name])
        return super().read(tensors, name)

    def _stacked(self, tensors: Mapping[str, TensorRef], fused: FusedExperts) -> Tensor:
        """The parameter of all experts of a layer, in the order of its class."""
        experts = self.table.layers[fused.layer].experts
        assert experts is not None
        is_bias = fused.kind.endswith("_bias")
        names = experts.biases if is_bias else experts.tensors
        made = []
        for number in range(experts.count):
            parts = [tensors[names[part][number]].read().T for part in FUSED_PARTS[fused.kind]]
            joined = self.join(*parts) if len(parts) == 2 else parts[0]  # (.., out)
            made.append(joined if experts.transposed or is_bias else joined.T)
        if not fused.kind.startswith("down_proj"):  # places for experts that return their input
            made += [torch.zeros_like(made[0])] * (experts.choices - experts.count)
        return torch.stack(made)

    def holds(self, tensors: Container[str], name: str) -> bool:
        if name in self.table.joined:
            return all(tensor in tensors for tensor in self.table.joined[name].tensors)
        if name in self.table.fused:
            return not self._takes_turns(self.table.fused[name].layer)
        return self.tensor_name(name) in tensors

    def _takes_turns(self, layer: int) -> bool:
        experts = self.table.layers[layer].experts
        return experts is not None and experts.takes_turns

    def fused_experts(self, name: str) -> FusedExperts | None:
        return self.table.fused.get(name)

    def shapes(self, config: PreTrainedConfig) -> Shapes:
        return dict(self.table.shapes)

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        return cast(nn.ModuleList, model.get_submodule(self.table.layers_path))

    def set_layers(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        path, _, last = self.table.layers_path.rpartition(".")
        setattr(model.get_submodule(path), last, layers)

    def experts_path(self, layer: int) -> str:
        experts = self.table.layers[layer].experts
        assert experts is not None
        return experts.module

    def experts_of(self, layer: nn.Module) -> Any:
        return next((m for m in layer.modules() if takes_turns(m)), None)


def derived_family(source: Source) -> Family | None:
    """The family of a checkpoint that transformers runs; None if it does not know the architecture.

    Raises InputError if it makes no such model, or one that is not like others in what matters.
    """
    config = derived_config(source)
    if config is None:
        return None
    path = source.path / "config.json"
    with refused(f"{path}: transformers makes no model of it"):
        classes = cast(Mapping[Any, Any], _classes(source.config))
        model_class = cast(type[PreTrainedModel], classes[type(config)])
        with torch.device("meta"):
            # Parameters that are not in this dtype stay in their own, whatever a model computes in.
            model = model_class._from_config(config, dtype=torch.bfloat16).eval()
        model.requires_grad_(False)
    table = table_of(path, model)
    experts = [layer.experts for layer in table.layers if layer.experts]
    first = experts[0] if experts else None
    return DerivedFamily(
        name=config.model_type.replace("_", "-"),
        config_class=type(config),
        model_class=model_class,
        matrices=lambda config, layer: {},
        fields=lambda path, content: content,
        experts={part: part for part in first.tensors} if first else {},
        transposed=first is not None and first.transposed,
        interleaved=first is not None and first.interleaved,
        biased=first is not None and bool(first.biases),
        mixture_norm=None,
        mlp_norm="" if config.model_type in _PLAIN else None,
        attention_norm="" if config.model_type in _PLAIN else None,
        tied=table.tied,
        integers=table.integers,
        turned=table.turned,
        stacked=table.stacked,
        beyond=tuple(_beyond(model, source.config, table)),
        streams=table.passing.streams,
        branches=False,
        returned=table.passing.returned,
        by_row=table.passing.by_row,
        notice="; ".join(_notices(model, table)) or None,
        table=table,
    )


def _beyond(model: PreTrainedModel, content: dict, table: Table) -> Iterator[str]:
    """Patterns of tensors that the model does not read.

    They are those that it or a model inside it names, such as keys of layers that take them from
    others; and, for multi-token prediction, the module that most models call mtp, and as many
    layers after the last one as the `content` of config.json says.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            yield from module._keys_to_ignore_on_load_unexpected or ()
    yield r"^(model\.)?mtp\."
    for layer in table.layers:
        if layer.experts and layer.experts.unused:
            yield f"^({'|'.join(map(re.escape, layer.experts.unused))})$"
    text = content.get("text_config")
    fields = content | text if isinstance(text, dict) else content
    further = [fields[key] for key in _FURTHER_LAYERS if isinstance(fields.get(key), int)]
    layers = len(table.layers)
    for number in range(layers, layers + min(max(further, default=0), _MOST_FURTHER)):
        yield rf"^{re.escape(table.layers_path)}\.{number}\."


def _notices(model: PreTrainedModel, table: Table) -> Iterator[str]:
    if not table.passing.streams:
        yield _WHOLE
    layers = model.get_submodule(table.layers_path)
    for name in stacks_in(layers):
        whole = f"{table.layers_path}.{name}"
        if whole not in table.fused and table.names.get(whole) not in table.stacked:
            yield f"{name} and the like are not quantized: they are experts of an unknown form"
            return


def derived_config(source: Source) -> PreTrainedConfig | None:
    """The config of such a checkpoint, None as in `derived_family`. Raises InputError."""
    kind = str(source.config.get("model_type"))
    if _classes(source.config) is None or kind not in CONFIG_MAPPING:
        return None
    path = source.path / "config.json"
    check_bounds(path, source.config)
    with refused(f"{path}: transformers makes no model of it"):
        return _config_of(CONFIG_MAPPING[kind], source.config)


# Names of classes by model_type, and the classes by those of their configs.
_CLASSES = (
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING),
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
)


def _classes(content: dict) -> Mapping[Any, Any] | None:
    """transformers' table of classes that has the architecture of a config.json, if one has."""
    match content.get("architectures"):
        case [str(name)]:
            for names, classes in _CLASSES:
                known = names.get(str(content.get("model_type")), ())
                if name in ((known,) if isinstance(known, str) else known):
                    return cast(Mapping[Any, Any], classes)
    return None


def _config_of(config_class: type[PreTrainedConfig], content: dict) -> PreTrainedConfig:
    given = {key: value for key, value in content.items() if defines_the_model(key)}
    given = PreTrainedConfig._decode_special_floats(deepcopy(given))  # it changes what it is given
    return config_class.from_dict(given)
