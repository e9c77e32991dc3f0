"""What a model does with its linear modules and layers, seen on the meta device.

There tensors have shapes and no values; experts return zeros.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from grokquant.families.family import LINEAR
from grokquant.families.taps import Tap

_SILENT = "grokquant-silent"  # the name of experts without weights in transformers' registry
# Sizes of no axis in a model, so that an axis of rows can be told by its size.
_ROWS = 13
_TOKENS = 11
_LONGEST_TUPLE = 4


def _no_experts(self: nn.Module, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
    return torch.zeros_like(x)


ALL_EXPERTS_FUNCTIONS.register(_SILENT, _no_experts)


@dataclass
class Trace:
    """A pass through a model. `reads`: its linear modules by name, in the order of their first
    call, with a number for what each reads. `carried`: objects that layers filled for later ones.
    """

    reads: dict[str, int] = field(default_factory=dict)
    carried: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Passing:
    """How a model hands hidden states from layer to layer.

    `streams`: a layer gets what the one before it returned, and nothing else that depends on that.
    `returned`: the items of the tuple that a layer returns, 0 where it is none. `by_row`: what
    layers are also given depends on the tokens, so each row has its own.
    """

    streams: bool
    returned: int = 0
    by_row: bool = False


def traced(model: PreTrainedModel, layers: nn.ModuleList) -> Trace | None:
    """A pass of `model`, on the meta device; None if it looks at values, which are not there."""
    trace = Trace()
    inputs: list[Tensor] = []  # all are kept, so that no two of them have the same id
    numbers: dict[int, int] = {}
    given: list[Any] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0])
            trace.reads.setdefault(name, numbers.setdefault(id(args[0]), len(numbers)))

        return hook

    def note_given(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given.extend(value for value in (*args, *kwargs.values()) if _may_carry(value))

    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, LINEAR)]
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in linears]
    hooks += [layer.register_forward_pre_hook(note_given, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            _run(model)
    except Exception:  # of any class, from deep in the model
        return None
    finally:
        for hook in hooks:
            hook.remove()
    trace.carried = [value for value in given if not hasattr(value, "__len__") or len(value)]
    return trace


def passing(model: PreTrainedModel, path: str, trace: Trace | None) -> Passing:
    """How `model`, on the meta device, runs the layers in its list `path`."""
    for returned in range(_LONGEST_TUPLE + 1):
        layers = model.get_submodule(path)
        taps = [_Returning(layer, returned) for layer in layers.children()]
        with _replaced(model, path, taps), torch.enable_grad():
            try:
                logits = _run(model)
            except Exception:  # of any class, from deep in the model
                continue
        if _is_chain(taps, logits):
            given = [value for tap in taps for value in tap.may_carry()]
            handed_on = [value for value in given if type(value) is object]
            carried = handed_on or (trace.carried if trace else given)
            streams = not carried and not _passes_layers(model, path, returned)
            by_row = any(_has_rows(tap.arguments) for tap in taps)
            return Passing(streams, returned, by_row)
    return Passing(streams=False)


def _passes_layers(model: PreTrainedModel, path: str, returned: int) -> bool:
    """Whether something goes from the embedding to the head beside all layers."""
    layers = model.get_submodule(path)
    taps = [_Returning(layer, returned, tracked=False) for layer in layers.children()]
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda *call: call[-1].detach().requires_grad_().clone())
    try:
        with _replaced(model, path, taps), torch.enable_grad():
            return _run(model).requires_grad
    finally:
        hook.remove()


class _Returning(Tap):
    """A tap whose output is a tensor of its own, by which the next layer's input is recognized."""

    def __init__(self, layer: nn.Module, returned: int, tracked: bool = True) -> None:
        super().__init__(layer, returned)
        self.tracked = tracked  # whether what is made of its output can be told
        self.calls = 0
        self.beside = object()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        first = args[0] if args else kwargs["hidden_states"]
        self.hidden = torch.empty_like(first, requires_grad=self.tracked)
        return super().forward(*args, **kwargs)

    def may_carry(self) -> Iterator[Any]:
        args, kwargs = self.arguments
        return (value for value in (*args, *kwargs.values()) if _may_carry(value))


def _is_chain(taps: list[_Returning], logits: Tensor) -> bool:
    """Whether each layer ran once, on what the one before returned, [rows, time, ...], and nothing
    else depends on what layers return."""
    if any(tap.calls != 1 or tap.entered.shape[:2] != (_ROWS, _TOKENS) for tap in taps):
        return False
    if any(_depends(tap.arguments) for tap in taps):
        return False
    if any(b.entered is not a.hidden for a, b in pairwise(taps)):
        return False
    returned = [cast(Tensor, tap.hidden) for tap in taps]
    with torch.enable_grad():
        *others, last = torch.autograd.grad(logits.sum(), returned, allow_unused=True)
    return last is not None and all(grad is None for grad in others)


def _depends(value: Any) -> bool:
    """Whether a tensor in `value` was computed from what a layer returned."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(map(_depends, value.values()))
    return isinstance(value, tuple | list) and any(map(_depends, value))


def _may_carry(value: Any) -> bool:
    """Whether a layer could leave something for later ones in an argument."""
    if isinstance(value, dict):
        return not value
    if isinstance(value, tuple):
        return any(map(_may_carry, value))
    plain = (Tensor, bool, int, float, str, torch.dtype, torch.device)
    return value is not None and not isinstance(value, plain)


def _has_rows(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0 and value.shape[0] == _ROWS
    if isinstance(value, dict):
        return any(_has_rows(item) for item in value.values())
    return isinstance(value, tuple | list) and any(_has_rows(item) for item in value)


def _run(model: PreTrainedModel) -> Tensor:
    before = model.config._experts_implementation
    packed = masking_utils.find_packed_sequence_indices
    warn = PreTrainedModel.warn_if_padding_and_no_attention_mask
    model.config._experts_implementation = _SILENT
    # They look at values, for several texts in a row and for padding. There is one text.
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    PreTrainedModel.warn_if_padding_and_no_attention_mask = lambda *given: None  # type: ignore
    tokens = torch.zeros(_ROWS, _TOKENS, dtype=torch.long, device="meta")
    try:
        return model(input_ids=tokens, use_cache=False).logits
    finally:
        model.config._experts_implementation = before
        masking_utils.find_packed_sequence_indices = packed
        PreTrainedModel.warn_if_padding_and_no_attention_mask = warn  # type: ignore


@contextmanager
def _replaced(model: nn.Module, path: str, modules: list[Any]) -> Iterator[None]:
    """Puts other modules in the place of a list of them for a while."""
    parent, _, last = path.rpartition(".")
    owner = model.get_submodule(parent)
    before = getattr(owner, last)
    setattr(owner, last, nn.ModuleList(modules))
    try:
        yield
    finally:
        setattr(owner, last, before)
