"""What a model does with its linear modules and layers, seen on the meta device.

There tensors have shapes and no values; experts return zeros.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from grokquant.families.taps import Tap

_SILENT = "grokquant-silent"  # the name of experts without weights in transformers' registry
# Sizes of no axis in a model, so that an axis of rows can be told by its size.
_ROWS = 13
_TOKENS = 11


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
    `in_tuples`: layers return a tuple that begins with it. `by_row`: what they are also given
    depends on the tokens, so each row has its own.
    """

    streams: bool
    in_tuples: bool = False
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

    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in linears]
    hooks += [layer.register_forward_pre_hook(note_given, with_kwargs=True) for layer in layers]
    try:
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
    for in_tuples in (False, True):
        layers = model.get_submodule(path)
        taps = [_Returning(layer, in_tuples) for layer in layers.children()]
        with _replaced(model, path, taps):
            try:
                _run(model)
            except Exception:  # of any class, from deep in the model
                continue
        if _is_chain(taps):
            carries = trace.carried if trace else [v for tap in taps for v in tap.may_carry()]
            by_row = any(_has_rows(tap.arguments) for tap in taps)
            return Passing(not carries, in_tuples, by_row)
    return Passing(streams=False)


class _Returning(Tap):
    """A tap whose output is a tensor of its own, by which the next layer's input is recognized."""

    def __init__(self, layer: nn.Module, in_tuple: bool) -> None:
        super().__init__(layer, in_tuple)
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        first = args[0] if args else kwargs["hidden_states"]
        self.hidden = torch.empty_like(first)
        return super().forward(*args, **kwargs)

    def may_carry(self) -> Iterator[Any]:
        args, kwargs = self.arguments
        return (value for value in (*args, *kwargs.values()) if _may_carry(value))


def _is_chain(taps: list[_Returning]) -> bool:
    """Whether each layer ran once, on what the one before returned: [rows, time, ...]."""
    if any(tap.calls != 1 or tap.entered.shape[:2] != (_ROWS, _TOKENS) for tap in taps):
        return False
    return all(b.entered is a.hidden for a, b in pairwise(taps))


def _may_carry(value: Any) -> bool:
    """Whether a layer could leave something for later ones in an argument."""
    if isinstance(value, dict):
        return not value
    plain = (Tensor, bool, int, float, str, tuple, torch.dtype, torch.device)
    return value is not None and not isinstance(value, plain)


def _has_rows(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0 and value.shape[0] == _ROWS
    if isinstance(value, dict):
        return any(_has_rows(item) for item in value.values())
    return isinstance(value, tuple | list) and any(_has_rows(item) for item in value)


def _run(model: PreTrainedModel) -> None:
    before = model.config._experts_implementation
    model.config._experts_implementation = _SILENT
    tokens = torch.zeros(_ROWS, _TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    finally:
        model.config._experts_implementation = before


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
