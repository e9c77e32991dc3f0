"""What a model family is: a table of tensor names plus transformers' classes that run it."""

import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grokquant.errors import InputError
from grokquant.families.config import carried_keys, check_fields, check_sizes, model_keys
from grokquant.families.remote_code import RemoteCode
from grokquant.memory import refused
from grokquant.types import Matrix, TensorRef

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# (config, layer) -> names of its quantizable matrices, part -> end of the tensor's name
Matrices = Callable[[PreTrainedConfig, int], Mapping[str, str]]
# Modules that multiply with a matrix; Conv1D holds it as [in, out].
LINEAR = (nn.Linear, Conv1D)
# Parts that read the same input, whatever the family: the first of each names it.
_SAME_INPUT = (
    ("attention.q", "attention.k", "attention.v", "attention.q_a", "attention.kv_a"),
    ("mlp.gate", "mlp.up"),
    ("shared.gate", "shared.up"),
    ("gate", "up"),
)
_EXPERT_PARTS = ("gate", "up", "down")
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
    `mixture_norm` if that has a name; it is None if the layer does more with the sum. `mlp_norm` is
    the same for the output of a dense MLP, down(act(gate) * up), and `attention_norm` for that of
    attention.o. Norms multiply by their weights plus `norm_offset`.

    config.json: `fields` picks the fields that define the model, given the file's path and content;
    it raises InputError if they describe no model of the family. An output's config.json has the
    fields of the config class and `other_fields`, which are understood here or read by other
    programs; with `only_own_fields` it has what `fields` returns. `architecture` is the model's
    name there, by default that of its class. `engine_fields` gives what engines also ask of an
    output's config.json, though the model does not. `remote_code` is the file that lets
    transformers alone open an output, None where it needs none or there is none. `notice` is a line
    to show to every user of the family. `tied` names tensors that may be stored although they equal
    another one, `integers` those that hold integers, `turned` matrices that published files and the
    model hold as [in, out]: here they are [out, in], under names of our own. So are those in
    `stacked`, whose rows are those of several experts; its values are their shapes in the model.
    Layers run one by one if the family `streams`: a layer depends on the states that the one before
    it returned, first of `returned` items if they are in a tuple, and on what all rows share, or,
    `by_row`, on the tokens. `branches`: tokens that a mask keeps apart are apart. `beyond` are
    patterns of tensors that files may have and the model does not, such as those for predicting
    several tokens.
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
    mlp_norm: str | None = ""
    attention_norm: str | None = ""
    norm_offset: float = 0.0
    fields: Callable[[Path, dict], dict] = check_fields
    only_own_fields: bool = False
    other_fields: frozenset[str] = frozenset()
    architecture: str | None = None
    engine_fields: Callable[[PreTrainedConfig], dict] = lambda config: {}
    remote_code: RemoteCode | None = None
    notice: str | None = None
    layer_prefix: str = "model.layers.{layer}."
    integers: frozenset[str] = frozenset()
    turned: frozenset[str] = frozenset()
    stacked: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    beyond: tuple[str, ...] = ()
    streams: bool = True
    branches: bool = True
    returned: int = 0
    by_row: bool = False
    tied: Mapping[str, str] = field(default_factory=lambda: {HEAD: EMBEDDING})

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

    def num_layers(self, config: PreTrainedConfig) -> int:
        """Decoder layers."""
        return config.num_hidden_layers

    def num_experts(self, config: PreTrainedConfig, layer: int) -> int:
        """Routed experts of a layer, 0 where it is dense."""
        return config.num_experts if self.experts and self.routed(config, layer) else 0

    def ends_with_experts(self, config: PreTrainedConfig, layer: int) -> bool:
        """Whether all that a layer does after its attention is adding the sum of its experts."""
        shared = any(part.startswith("shared") for part in self.matrices(config, layer))
        has_experts = self.num_experts(config, layer) > 0
        return has_experts and self.streams and self.mixture_norm is not None and not shared

    def units(self, config: PreTrainedConfig) -> Iterator[Matrix]:
        """Every quantizable matrix, layer by layer."""
        for layer in range(self.num_layers(config)):
            for part, tensor in self.matrix_tensors(config, layer).items():
                reads = self.reads(layer, part)
                yield Matrix(f"layers.{layer}.{part}", tensor, layer, part, reads)
            for expert in range(self.num_experts(config, layer)):
                for part, tensor in self.expert_tensors(layer, expert).items():
                    name = f"layers.{layer}.experts.{expert}.{part}"
                    yield Matrix(name, tensor, layer, part, _READS.get(part, part), expert)

    def reads(self, layer: int, part: str) -> str:
        """The first part of a layer that reads the same input as `part`."""
        return _READS.get(part, part)

    def matrix_tensors(self, config: PreTrainedConfig, layer: int) -> dict[str, str]:
        """Checkpoint names of the matrices of a layer outside its routed experts, by part."""
        prefix = self.layer_prefix.format(layer=layer)
        return {part: prefix + end for part, end in self.matrices(config, layer).items()}

    def lone_expert(self, config: PreTrainedConfig, layer: int) -> dict[str, str]:
        """Checkpoint names of the gate, up and down of a layer's dense MLP; empty if the layer has
        experts, or does more with the MLP than a layer does with one expert."""
        if self.mlp_norm is None or not self.streams or self.num_experts(config, layer):
            return {}
        tensors = self.matrix_tensors(config, layer)
        if any(f"mlp.{part}" not in tensors for part in _EXPERT_PARTS):
            return {}
        return {part: tensors[f"mlp.{part}"] for part in _EXPERT_PARTS}

    def ends_attention(self, config: PreTrainedConfig, layer: int) -> bool:
        """Whether all that a layer does with the output of its attention.o is adding it to the
        residual, after a norm or not."""
        has_output = "attention.o" in self.matrix_tensors(config, layer)
        return has_output and self.streams and self.attention_norm is not None

    def takes_aim(self, config: PreTrainedConfig, layer: int, part: str) -> bool:
        """Whether a matrix outside the routed experts can be rounded towards what it gives in the
        original: that of attention, or of a shared expert."""
        apart = part.startswith(("attention.", "shared."))
        return apart and self.ends_attention(config, layer)

    def attention_output(self, config: PreTrainedConfig, layer: int) -> str:
        """Checkpoint name of the matrix that projects a layer's attention to the residual."""
        return self.matrix_tensors(config, layer)["attention.o"]

    def layer_of(self, tensor: str) -> int | None:
        """The layer to which a checkpoint tensor belongs, None for those outside the layers."""
        pattern = re.escape(self.layer_prefix).replace(r"\{layer\}", r"(\d+)")
        found = re.match(pattern, tensor)
        return int(found[1]) if found else None

    def expert_tensors(self, layer: int, expert: int) -> dict[str, str]:
        """Checkpoint names of an expert's matrices by part: gate, up, down."""
        prefix = self.layer_prefix.format(layer=layer)
        return {part: prefix + end.format(expert=expert) for part, end in self.experts.items()}

    @property
    def names_experts(self) -> bool:
        """Whether the names of single experts are our own, since files hold them as one tensor."""
        return self.biased

    @property
    def joins(self) -> bool:
        """Whether transformers makes some parameters of several tensors, beside experts, or has
        linear modules of a class of its own or sets their weights: then it loads no quantized
        ones."""
        return False

    @property
    def runs_experts(self) -> bool:
        """Whether experts can run one by one, on the tokens that are routed to them."""
        return True

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
            for layer in range(self.num_layers(config))
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
        prefix = self.module_prefix(index)
        names = (name for name, _ in stored_values(layer))
        return next(name for name in names if self.tensor_name(prefix + name) == tensor)

    def module_prefix(self, layer: int) -> str:
        """What the names of the parameters of a decoder layer begin with in its model."""
        return self.layer_prefix.format(layer=layer)

    def tensor_name(self, name: str) -> str:
        """The family's own name for the tensor that a file or transformers calls `name`."""
        return _replaced(name, self.aliases)

    def module_weight(self, tensor: str) -> str:
        """The name in transformers' model of the weight that the family calls `tensor`."""
        return tensor

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

    def set_layers(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        """Puts other modules in the place of the decoder layers of a model."""
        model.base_model.layers = layers

    def read(self, tensors: Mapping[str, TensorRef], name: str) -> Tensor:
        """The value of the parameter that transformers calls `name`."""
        tensor = self.tensor_name(name)
        return self.as_parameter(tensor, tensors[tensor].read())

    def as_parameter(self, tensor: str, value: Tensor) -> Tensor:
        """The `value` of a checkpoint tensor as the model holds it."""
        if tensor in self.turned:
            return value.T.contiguous()
        return value.reshape(self.stacked[tensor]) if tensor in self.stacked else value

    def sees_inputs(self, matrix: Matrix) -> bool:
        """Whether the inputs of a matrix can be seen, those of single experts too."""
        if matrix.expert is not None:
            return self.runs_experts
        return matrix.tensor not in self.stacked

    def holds(self, tensors: Container[str], name: str) -> bool:
        """Whether `tensors` have what the parameter that transformers calls `name` is made of."""
        return self.tensor_name(name) in tensors

    def fused_experts(self, name: str) -> "FusedExperts | None":
        """What the tensor with the family's name `name` holds of all experts of a layer."""
        if not self.experts:
            return None
        module, _, _ = self.experts["gate"].partition("{expert}")
        layer = re.escape(self.layer_prefix).replace(r"\{layer\}", r"(\d+)")
        found = re.fullmatch(f"{layer}{re.escape(module)}({'|'.join(FUSED_PARTS)})", name)
        if found is None:
            return None
        return FusedExperts(int(found[1]), found[2], self.transposed, self.interleaved)

    def shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        """Checkpoint names and shapes of all tensors of a model, experts one by one."""
        model = self.empty_model(config)
        layers = self.layers(model)
        fused = {id(p) for layer in layers for p in self._experts_parameters(layer)}
        shapes = {
            self.tensor_name(name): tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if id(parameter) not in fused and name not in model.all_tied_weights_keys
        }
        for layer, block in enumerate(layers):
            for expert in range(self.num_experts(config, layer)):
                inner, hidden = self.expert_shape(block)
                for part, name in self.expert_tensors(layer, expert).items():
                    shapes[name] = (hidden, inner) if part == "down" else (inner, hidden)
                for part, name in self.expert_biases(layer, expert).items():
                    shapes[name] = (hidden,) if part == "down" else (inner,)
        return shapes

    def _experts_parameters(self, layer: nn.Module) -> list[nn.Parameter]:
        experts = self.experts_of(layer)
        return [] if experts is None else list(experts.parameters())

    def experts_of(self, layer: nn.Module) -> Any:
        """The module of a decoder layer's experts (fused 3-D weights), or None if it is dense."""
        try:
            return layer.get_submodule(self.fused)
        except AttributeError:
            return None

    def expert_view(self, layer: nn.Module, matrix: Matrix) -> Tensor:
        """A view [out, in] of a matrix of an expert in the parameter that holds those of all."""
        assert matrix.expert is not None
        experts = layer.get_submodule(self.experts_path(matrix.layer))
        kind = next(
            k for k, parts in FUSED_PARTS.items() if matrix.part in parts and hasattr(experts, k)
        )
        parts = FUSED_PARTS[kind]
        whole = getattr(experts, kind).data[matrix.expert]
        rows = whole.T if self.transposed else whole  # (out, in)
        place = parts.index(matrix.part)
        if self.interleaved:
            return rows[place :: len(parts)]
        return rows.chunk(len(parts))[place]

    def experts_path(self, layer: int) -> str:
        """The path of the experts' module in a decoder layer."""
        return self.fused

    def expert_shape(self, layer: nn.Module) -> tuple[int, int]:
        """(inner, hidden) features of the experts of a decoder layer."""
        hidden, inner = self.experts_of(layer).down_proj.shape[1:]
        return (hidden, inner) if self.transposed else (inner, hidden)

    def join(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """gate and up [..., inner] as one [..., 2 * inner], in the order of fused parameters; up
        alone where experts have no gate."""
        if gate is None:
            return up
        if self.interleaved:
            return torch.stack((gate, up), dim=-1).flatten(-2)
        return torch.cat((gate, up), dim=-1)

    def empty_model(
        self, config: PreTrainedConfig, dtype: torch.dtype = torch.float32
    ) -> PreTrainedModel:
        """The model with all parameters on the meta device, where they take no memory.

        Its buffers, such as rotary frequencies, have the values that transformers computes for a
        model in `dtype`, and the same dtypes.
        """
        with torch.device("meta"), _default_dtype(dtype):
            model = self.model_class(config).eval()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                unknown = torch.nan if buffer.is_floating_point() else 0
                module._buffers[name] = torch.full_like(buffer, unknown, device="cpu")
        _fill_buffers(model, model)
        stored = dict(stored_values(model))
        for name, buffer in model.named_buffers():
            if name not in stored and buffer.isnan().any():
                raise InputError(f"transformers computes no values for the buffer {name}")
        return model


@dataclass(frozen=True)
class FusedExperts:
    """A tensor of all experts of `layer`: a key of FUSED_PARTS, and how its axes are ordered.

    Some files have [in, out] where others have [out, in]; then `shape` [out, in] tells which.
    """

    layer: int
    kind: str
    transposed: bool
    interleaved: bool
    shape: tuple[int, int] | None = None

    def as_stored(self, shape: tuple[int, ...]) -> "FusedExperts":
        """The same, transposed or not as a tensor [experts, ...] of this shape is."""
        if self.shape is None or self.shape[0] == self.shape[1]:
            return self
        return replace(self, transposed=shape[1:] == self.shape[::-1])


# Parts of each expert in a fused tensor.
FUSED_PARTS = {
    "gate_up_proj": ("gate", "up"),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "gate_up_proj_bias": ("gate", "up"),
    "up_proj_bias": ("up",),
    "down_proj_bias": ("down",),
}


def stored_values(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what checkpoints store of a module: parameters and some buffers."""
    yield from module.named_parameters()
    for path, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _fill_buffers(module: nn.Module, model: PreTrainedModel) -> None:
    """Has the innermost `model` of each module fill its buffers, as transformers does."""
    if isinstance(module, PreTrainedModel):
        model = module
    for child in module.children():
        _fill_buffers(child, model)
    if module._buffers or module is model:
        model._init_weights(module)


def _replaced(name: str, replacements: Mapping[str, str]) -> str:
    for pattern, replacement in replacements.items():
        name = re.sub(pattern, replacement, name)
    return name


def tie_weights(model: PreTrainedModel) -> None:
    """Ties the parameters that `model` still has: those of packed and replaced modules are gone."""
    held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {n: of for n, of in ties if n in held and of in held}
    model.tie_weights(recompute_mapping=False)


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replaces the parameter or buffer called `name` by `value`."""
    parent, last = parameter_parent(module, name)
    if last in parent._buffers:
        parent._buffers[last] = value
    else:
        setattr(parent, last, nn.Parameter(value, requires_grad=False))


def parameter_parent(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds the parameter called `name`, and the parameter's name in it."""
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last
