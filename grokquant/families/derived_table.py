"""The table of a derived family: what a model of transformers consists of, and its names in files.

the model on the meta device   decoder layers, linear modules, experts
its names in files             which tensors are matrices, which hold all experts of a layer
a trace of it                  the order of the linear modules, and which read the same input
"""

import re
from collections.abc import Container, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grokquant.errors import InputError
from grokquant.families.family import FUSED_PARTS, LINEAR, FusedExperts
from grokquant.families.stored_names import Conversion, Shapes, StoredNames
from grokquant.families.traced import Passing, Trace, passing, traced
from grokquant.memory import refused

# Words in the names of modules, and the roles of the matrices in them; the first that fits counts.
_ROLES = (
    ("shared", "shared"),
    ("attn", "attention"),
    ("attention", "attention"),
    ("mlp", "mlp"),
    ("feed_forward", "mlp"),
    ("ffn", "mlp"),
    ("moe", "mlp"),
)
_OWN_FAMILY = "docs/extending.md shows how to write its family in one file"
# A linear module with far fewer outputs than inputs is a gate or a router: it weighs nothing, and
# its errors decide where tokens go.
FEWEST_OUTPUTS = 32


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer, in the submodule `module`.

    `tensors` and `biases` are checkpoint names by part, in the order of the experts; `own_names`
    are those of ours, since files hold all experts as one tensor. `unused` are names of matrices
    without a down projection: of experts that return their input, which published files leave out.
    A router chooses between those and the experts, which are `choices` in all. `takes_turns`:
    transformers lets others compute the experts, so they can run one by one.
    """

    module: str
    count: int
    tensors: Mapping[str, list[str]]
    biases: Mapping[str, list[str]]
    unused: tuple[str, ...]
    choices: int
    shapes: Mapping[str, tuple[int, int]]  # part -> [out, in]
    transposed: bool
    interleaved: bool
    own_names: bool
    takes_turns: bool


@dataclass(frozen=True)
class LayerTable:
    """A decoder layer: its path in the model, checkpoint names of its matrices by part in the order
    of computation, the first part that `reads` the same input, the paths of linear modules that
    stay as they are, and its experts."""

    path: str
    matrices: Mapping[str, str]
    reads: Mapping[str, str]
    others: tuple[str, ...]
    experts: Experts | None


@dataclass(frozen=True)
class Table:
    """A model: checkpoint names by those of its parameters, and all that is read of a file.

    `outside` are the paths of linear modules that belong to no layer; `own_linears`: some are of a
    class of the model's own, the model's code sets their weights, or several layers share them.
    """

    layers_path: str
    layers: tuple[LayerTable, ...]
    outside: tuple[str, ...]
    names: Mapping[str, str]
    joined: Mapping[str, Conversion]
    fused: Mapping[str, FusedExperts]
    shapes: Shapes
    tied: Mapping[str, str]
    integers: frozenset[str]
    turned: frozenset[str]
    stacked: Mapping[str, tuple[int, ...]]
    wide: frozenset[str]
    own_linears: bool
    passing: Passing
    stored: StoredNames = field(repr=False)

    @cached_property
    def layer_of(self) -> dict[str, int]:
        """The layer of each checkpoint tensor that belongs to one."""
        return dict(self._layers_of_tensors())

    def _layers_of_tensors(self) -> Iterator[tuple[str, int]]:
        numbers = {layer.path: number for number, layer in enumerate(self.layers)}
        depth = self.layers_path.count(".") + 2
        for name, tensor in self.names.items():
            place = ".".join(name.split(".")[:depth])
            if place in numbers:
                yield tensor, numbers[place]
        for name, conversion in self.joined.items():
            place = ".".join(name.split(".")[:depth])
            if place in numbers:
                yield from ((tensor, numbers[place]) for tensor in conversion.tensors)
        for number, layer in enumerate(self.layers):
            if layer.experts:
                for names in (*layer.experts.tensors.values(), *layer.experts.biases.values()):
                    yield from ((tensor, number) for tensor in names)

    @cached_property
    def module_names(self) -> dict[str, str]:
        """Names of parameters by those of the checkpoint."""
        return {tensor: name for name, tensor in self.names.items()}

    @cached_property
    def on_the_way(self) -> dict[str, str]:
        """Checkpoint names by those that transformers gives them while it reads a file."""
        return {self.stored.of_model(tensor): tensor for tensor in self.shapes}


def table_of(path: Path, model: PreTrainedModel) -> Table:
    """The table of a model on the meta device. Raises InputError that names `path`."""
    stored = StoredNames(model)
    with refused(f"{path}: the names of its tensors in files are not known"):
        conversions = {name: c for c in stored.conversions for name in c.parameters}
    layers_path = _layers_path(path, model)
    layers = cast(nn.ModuleList, model.get_submodule(layers_path))
    places = {f"{layers_path}.{number}": layer for number, layer in enumerate(layers)}
    experts = [_experts(place, layer, conversions) for place, layer in places.items()]
    held = _held(model, layers_path, experts, conversions)
    _refuse_split(path, model, layers_path, held.joined)
    trace = _trace_of(path, model, layers)
    tables = tuple(
        _layer_table(place, layer, held.names, found, trace, model.all_tied_weights_keys)
        for (place, layer), found in zip(places.items(), experts, strict=True)
    )
    if not any(table.matrices or table.experts for table in tables):
        raise InputError(
            f"{path}: {model.config.model_type} has no linear layers to quantize; {_OWN_FAMILY}"
        )
    ties = {n: held.names[of] for n, of in model.all_tied_weights_keys.items() if of in held.names}
    return Table(
        layers_path=layers_path,
        layers=tables,
        outside=tuple(_linears_outside(model, layers_path)),
        names=held.names | ties,
        joined=held.joined,
        fused=held.fused,
        shapes=held.shapes,
        tied=ties,
        integers=frozenset(_integers(model, held.names)),
        turned=held.turned,
        stacked=held.stacked,
        own_linears=_has_own_linears(model, layers, held.names, tables),
        wide=frozenset(_wide(model, tuple(places))),
        passing=passing(model, layers_path, trace),
        stored=stored,
    )


@dataclass(frozen=True)
class _Held:
    """What files hold of a model: some fields of its `Table`, before its parameters are tied."""

    names: dict[str, str]
    joined: dict[str, Conversion]
    fused: dict[str, FusedExperts]
    shapes: Shapes
    turned: frozenset[str]
    stacked: dict[str, tuple[int, ...]]


def _held(
    model: PreTrainedModel,
    layers_path: str,
    experts: list[Experts | None],
    conversions: Mapping[str, Conversion],
) -> _Held:
    fused, shapes = _fused_experts(layers_path, experts, conversions)
    others = {name: c for name, c in conversions.items() if name not in fused}
    shapes |= {tensor: size for c in others.values() for tensor, size in c.tensors.items()}
    names = {name: next(iter(c.tensors)) for name, c in others.items() if not c.operations}
    turned = dict(_turned(model, names))
    shapes |= {own: shapes.pop(tensor)[::-1] for tensor, own in turned.items()}
    stacks = dict(_stacked(model, layers_path, names))
    stacked = {own: shapes.pop(tensor) for tensor, own in stacks.items()}
    shapes |= {own: (prod(shape[:-1]), shape[-1]) for own, shape in stacked.items()}
    own_names = turned | stacks
    return _Held(
        names={name: own_names.get(tensor, tensor) for name, tensor in names.items()},
        joined={name: c for name, c in others.items() if c.operations},
        fused=fused,
        shapes=shapes,
        turned=frozenset(turned.values()),
        stacked=stacked,
    )


def _fused_experts(
    layers_path: str, experts: list[Experts | None], conversions: Mapping[str, Conversion]
) -> tuple[dict[str, FusedExperts], Shapes]:
    """Parameters of all experts of a layer by their names, and the shapes of single experts'."""
    fused: dict[str, FusedExperts] = {}
    shapes: Shapes = {}
    for number, found in enumerate(experts):
        if found:
            fused |= dict(_fused(f"{layers_path}.{number}", number, found, conversions))
            shapes |= _shapes_of(found)
    return fused, shapes


def _integers(model: nn.Module, names: Mapping[str, str]) -> Iterator[str]:
    state = model.state_dict()
    return (tensor for name, tensor in names.items() if not state[name].is_floating_point())


def _has_own_linears(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    names: Mapping[str, str],
    tables: tuple[LayerTable, ...],
) -> bool:
    """Whether linear modules do or are more than transformers expects of quantized ones."""
    paths = tuple(f"{table.path}." for table in tables)
    if any(name.startswith(paths) for name in model.all_tied_weights_keys):
        return True
    if any(
        isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        for module in layers.modules()
    ):
        return True
    quantized = {tensor for table in tables for tensor in table.matrices.values()}
    linears = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and names.get(f"{path}.weight") in quantized
    ]
    return _sets_weights_of(linears, model, layers)


def _sets_weights_of(
    linears: list[nn.Linear], model: PreTrainedModel, layers: nn.ModuleList
) -> bool:
    """Whether the model's code for initial values needs the weights of `linears`, by running it
    without them: transformers runs it for modules whose weights a file holds packed."""
    decoder = model.get_decoder()
    owner = decoder if isinstance(decoder, PreTrainedModel) else model
    one_of_each = {type(m): m for m in layers.modules() if not isinstance(m, nn.Linear)}
    before = [module._parameters for module in linears]
    for module in linears:
        module._parameters = {k: p for k, p in module._parameters.items() if k != "weight"}
    try:
        with torch.no_grad():
            for filled in (*one_of_each.values(), *linears):
                owner._init_weights(filled)
    except AttributeError as error:
        return "has no attribute 'weight'" in str(error)
    except Exception:  # of any class, from code that looks at values
        return False
    finally:
        for module, parameters in zip(linears, before, strict=True):
            module._parameters = parameters
    return False


def _refuse_split(
    path: Path, model: PreTrainedModel, layers_path: str, joined: Mapping[str, Conversion]
) -> None:
    """Raises InputError for parameters of layers that files join: a matrix there is not one here.

    Those outside the layers, as of a model for images, are carried over as files have them.
    """
    for name, conversion in joined.items():
        if len(conversion.parameters) > 1 and name.startswith(f"{layers_path}."):
            raise InputError(
                f"{path}: {conversion.parameters[0]} and others of {model.config.model_type} are "
                f"one tensor in files, which is not supported; {_OWN_FAMILY}"
            )


def _trace_of(path: Path, model: PreTrainedModel, layers: nn.ModuleList) -> Trace | None:
    """Raises InputError for code that changes parameters while it runs: packed ones stay."""
    before = _versions(model)
    trace = traced(model, layers)
    after = _versions(model)
    if changed := [name for name in after if after[name] != before[name]]:
        raise InputError(
            f"{path}: the code of {model.config.model_type} changes {changed[0]} while it runs, "
            "which packed weights do not allow; set the key that asks for it to 0, such as "
            f"rescale_every of rwkv, or write a family: {_OWN_FAMILY}"
        )
    return trace


def _versions(model: nn.Module) -> dict[str, int]:
    """How often each parameter was changed in place, where torch counts that."""
    return {n: p._version for n, p in model.named_parameters() if not p.is_inference()}


def _wide(model: PreTrainedModel, places: tuple[str, ...]) -> Iterator[str]:
    """Parameters that are always float32, by their names in the model and in their layers."""
    fixed = model._keep_in_fp32_modules_strict or ()
    for name, value in model.state_dict().items():
        if value.dtype == torch.float32 or any(part in name for part in fixed):
            yield name
            depth = places[0].count(".") + 1
            if ".".join(name.split(".")[:depth]) in places:
                yield ".".join(name.split(".")[depth:])


def _turned(model: nn.Module, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names in files of matrices that the model holds as [in, out], and our names of them."""
    for path, module in model.named_modules():
        if isinstance(module, Conv1D) and f"{path}.weight" in names:
            yield names[f"{path}.weight"], f"{path}.linear.weight"


def _stacked(
    model: nn.Module, layers_path: str, names: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Names in files of matrices of several experts in one, and our names of them."""
    for name in stacks_in(model.get_submodule(layers_path)):
        whole = f"{layers_path}.{name}"
        if whole in names:
            yield names[whole], f"{whole.removesuffix('.weight')}.stacked.weight"


def stacks_in(layers: nn.Module) -> Iterator[str]:
    """Parameters that hold the matrices of several experts."""
    for name, value in layers.named_parameters():
        path, _, _ = name.rpartition(".")
        #   [experts, out, in], or [experts * out, in] in a module of experts that is not linear
        joined = "expert" in path and not isinstance(layers.get_submodule(path), LINEAR)
        axes = value.shape[1:] if value.ndim == 3 else value.shape
        if (value.ndim == 3 or (value.ndim == 2 and joined)) and min(axes) >= FEWEST_OUTPUTS:
            yield name


def _linears_outside(model: nn.Module, layers_path: str) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, LINEAR) and not path.startswith(f"{layers_path}."):
            yield path


def _layers_path(path: Path, model: PreTrainedModel) -> str:
    """The list of decoder layers: the outermost one in the text model, the largest of those."""
    # What a class calls its decoder may be its head.
    found = _lists_in(model, model.get_decoder()) or _lists_in(model, model.base_model)
    if not found:
        raise InputError(
            f"{path}: {type(model).__name__} of transformers has no list of layers; {_OWN_FAMILY}"
        )
    return min(found, key=lambda n: (n.count("."), -sum(p.numel() for p in found[n].parameters())))


def _lists_in(model: nn.Module, part: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of modules in a part of `model`, by their paths in it."""
    parts = {id(module) for module in part.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and id(module) in parts
    }


def _layer_table(
    place: str,
    layer: nn.Module,
    names: Mapping[str, str],
    experts: Experts | None,
    trace: Trace | None,
    shared: Container[str],
) -> LayerTable:
    linears = {path: m for path, m in layer.named_modules() if isinstance(m, LINEAR)}
    kept = {
        path
        for path, module in linears.items()
        if f"{place}.{path}.weight" not in names
        or (trace and f"{place}.{path}" not in trace.reads)
        or _is_gate(path, module, experts)
        or not _multiplies(module)
    }
    paths = [path for path in linears if path not in kept]
    if trace:
        order = list(trace.reads)
        paths.sort(key=lambda path: order.index(f"{place}.{path}"))
    parts: dict[str, str] = {}
    for path in paths:
        parts[_part(path, parts)] = path
    matrices = {part: names[f"{place}.{path}.weight"] for part, path in parts.items()}
    first: dict[int, str] = {}
    reads = {
        part: first.setdefault(trace.reads[f"{place}.{path}"], part) if trace else part
        for part, path in parts.items()
    }
    for name in stacks_in(layer):
        if f"{place}.{name}" in names:
            part = _part(name.removesuffix(".weight"), matrices)
            matrices[part] = names[f"{place}.{name}"]
            reads[part] = part
    others = sorted(path for path in kept if f"{place}.{path}.weight" not in shared)
    return LayerTable(place, matrices, reads, tuple(others), experts)


def _is_gate(path: str, module: nn.Linear | Conv1D, experts: Experts | None) -> bool:
    """Whether a linear module chooses or weighs what others compute."""
    if isinstance(module, Conv1D):
        return False
    if "router" in path or module.out_features * FEWEST_OUTPUTS <= module.in_features:
        return True
    if experts is None:
        return False
    block = experts.module.rpartition(".")[0]
    return path.startswith(block) and module.out_features in (1, experts.choices)


def _multiplies(module: nn.Linear | Conv1D) -> bool:
    """Whether a module of a subclass of Linear does what a linear module does, by trying it."""
    if isinstance(module, Conv1D) or type(module).forward is nn.Linear.forward:
        return True
    tried = copy(module)
    tried._parameters = {"weight": nn.Parameter(torch.randn(6, 4)), "bias": None}
    tried.in_features, tried.out_features = 4, 6
    x = torch.randn(1, 3, 4)
    try:
        return torch.allclose(tried(x), F.linear(x, tried.weight))
    except Exception:  # of any class, from code that expects other shapes
        return False


def _part(path: str, taken: Container[str]) -> str:
    """What a linear module is called in recipes: its role, and the rest of its name."""
    words = path.split(".")
    role, place = next(
        (
            (role, place)
            for sign, role in _ROLES
            for place, word in reversed(list(enumerate(words)))
            if sign in word
        ),
        (words[0], 0),
    )
    rest = words[place + 1 :] or words[place:]
    short = f"{role}.{_short(rest)}"
    return short if short not in taken else f"{role}.{_short(words)}"


def _short(words: list[str]) -> str:
    return "_".join(re.sub(r"_proj$|^proj_", "", word) for word in words)


def takes_turns(module: nn.Module) -> bool:
    """Whether a module is one of experts that transformers lets others compute."""
    own = getattr(module, "has_gate", None) is not None and hasattr(module, "is_concatenated")
    return own and not getattr(module, "has_post_expert_norm", False)


def _experts(place: str, layer: nn.Module, conversions: Mapping[str, Conversion]) -> Experts | None:
    """The experts of a layer, if it has any: a module with a 3-D parameter called down_proj."""
    for name, module in layer.named_modules():
        if getattr(getattr(module, "down_proj", None), "ndim", 0) == 3:
            return _experts_in(f"{place}.{name}", name, module, conversions)
    return None


def _experts_in(
    place: str, path: str, module: Any, conversions: Mapping[str, Conversion]
) -> Experts:
    parts = ("gate", "up") if hasattr(module, "gate_up_proj") else ("up",)
    first = module.gate_up_proj if "gate" in parts else module.up_proj
    count, *sizes = module.down_proj.shape
    #   down [experts, hidden, inner] beside [experts, 2 * inner, hidden], else both transposed
    transposed = first.shape[1:] != (len(parts) * sizes[1], sizes[0])
    inner, hidden = sizes if transposed else sizes[::-1]
    tensors: dict[str, list[str]] = {}
    biases: dict[str, list[str]] = {}
    for kind, of_kind in FUSED_PARTS.items():
        if isinstance(getattr(module, kind, None), Tensor):
            names = biases if kind.endswith("_bias") else tensors
            held = len(getattr(module, kind))
            names |= _single_names(place, kind, of_kind, held, conversions[f"{place}.{kind}"])
    unused = [name for names in (*tensors.values(), *biases.values()) for name in names[count:]]
    shapes = {part: (inner, hidden) for part in parts} | {"down": (hidden, inner)}
    return Experts(
        module=path,
        count=count,
        tensors={part: tensors[part][:count] for part in (*parts, "down")},
        biases={part: names[:count] for part, names in biases.items()},
        unused=tuple(unused),
        choices=len(first),
        shapes=shapes,
        transposed=transposed,
        interleaved=getattr(module, "is_concatenated", True) is False,
        own_names=len(conversions[f"{place}.down_proj"].tensors) == 1,
        takes_turns=takes_turns(module),
    )


def _single_names(
    place: str, kind: str, parts: tuple[str, ...], count: int, conversion: Conversion
) -> dict[str, list[str]]:
    """Checkpoint names by part of what `kind` holds of each expert: those of files, if they hold
    experts one by one, else names like those of modules."""
    stored = list(conversion.tensors)
    if len(stored) == count * len(parts):
        return {p: stored[i * count : (i + 1) * count] for i, p in enumerate(parts)}
    end = "bias" if kind.endswith("_bias") else "weight"
    return {p: [f"{place}.{n}.{p}_proj.{end}" for n in range(count)] for p in parts}


def _fused(
    place: str, number: int, experts: Experts, conversions: Mapping[str, Conversion]
) -> Iterator[tuple[str, FusedExperts]]:
    """Names of the parameters that hold all experts of layer `number`, in the model and in files.

    A file may have the axes of one in another order.
    """
    for kind in FUSED_PARTS:
        name = f"{place}.{experts.module}.{kind}"
        if name not in conversions:
            continue
        own = FusedExperts(number, kind, experts.transposed, experts.interleaved)
        yield name, own
        conversion = conversions[name]
        if len(conversion.tensors) > 1:
            continue
        (stored,) = conversion.tensors
        if stored != name:
            turned = "Transpose" in conversion.operations
            woven = "Interleave" in conversion.operations
            other = replace(own, transposed=own.transposed != turned)
            yield stored, replace(other, interleaved=own.interleaved != woven)
        elif not kind.endswith("_bias"):  # files of both kinds are known
            rows = sum(experts.shapes[part][0] for part in FUSED_PARTS[kind])
            columns = experts.shapes[FUSED_PARTS[kind][0]][1]
            yield name, replace(own, shape=(rows, columns))


def _shapes_of(experts: Experts) -> Shapes:
    shapes: Shapes = {}
    for part, names in experts.tensors.items():
        shapes |= dict.fromkeys(names, experts.shapes[part])
    for part, names in experts.biases.items():
        shapes |= dict.fromkeys(names, experts.shapes[part][:1])
    return shapes
