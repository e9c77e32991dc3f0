"""How transformers names the parameters of a model in files, from its own table of conversions.

`transformers.conversion_mapping` says for each kind of model what happens to the tensors of a file
when it is loaded: some are renamed, those of single experts are merged, others are joined.

    file     block_sparse_moe.experts.{0, 1, ..}.w1.weight, ..w3.weight      gate.weight
    model    mlp.experts.gate_up_proj                                       router.weight

Here the table is applied backwards to the parameters of a model without memory, as transformers
does when it saves one.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
    dot_natural_key,
)

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Conversion:
    """`tensors` of a file, in their order, that become the `parameters` of a model, or the other
    way round; `operations` are the names of transformers' operations on the way into a file."""

    parameters: tuple[str, ...]
    tensors: Shapes
    operations: tuple[str, ...] = ()


class StoredNames:
    """The names that transformers gives to the parameters of `model`, on the meta device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        own = [t for t in transforms if not isinstance(t, PrefixChange)]
        self._backwards = [t.reverse_transform() for t in reversed(own)]
        self._forwards = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in own if isinstance(t, WeightConverter)]
        self._prefix = model.base_model_prefix + "."

    @cached_property
    def conversions(self) -> list[Conversion]:
        """What is stored, in the order of the model; each tied parameter once."""
        return list(self._convert())

    def _convert(self) -> Iterator[Conversion]:
        renamings = [t for t in self._backwards if isinstance(t, WeightRenaming)]
        converters = [t for t in self._backwards if isinstance(t, WeightConverter)]
        by_pattern = {p: t for t in converters for p in t.source_patterns}
        groups: dict[str, WeightTransform] = {}
        tied = self._model.all_tied_weights_keys
        state = {k: v for k, v in self._model.state_dict().items() if k not in tied}
        for name, value in sorted(state.items(), key=lambda item: dot_natural_key(item[0])):
            stored, pattern = apply_converters(name, converters)
            if pattern is None:
                stored = apply_renamings(name, renamings)
                yield Conversion((name,), {stored: tuple(value.shape)})
                continue
            group = groups.setdefault(stored, deepcopy(by_pattern[pattern]))
            group.add_tensor(stored, name, pattern, value)
        for first, converter in groups.items():
            assert isinstance(converter, WeightConverter)
            names = sorted(set().union(*converter.layer_targets.values()), key=dot_natural_key)
            made = converter.convert(first, model=self._model, config=self._model.config)
            shapes = {apply_renamings(name, renamings): _shape(t) for name, t in made.items()}
            operations = tuple(type(op).__name__ for op in converter.operations)
            yield Conversion(tuple(names), shapes, operations)

    def of_model(self, name: str) -> str:
        """The name in the model, or on the way to it, of a tensor that a file calls `name`."""
        return apply_renamings(name, self._forwards)

    def joined(self, name: str, conversion: Conversion, read: Callable[[str], Tensor]) -> Tensor:
        """Parameter `name` of a conversion, of the tensors that `read` returns by their names."""
        converters = deepcopy(self._converters)
        by_pattern = {p: t for t in converters for p in t.source_patterns}
        for tensor in conversion.tensors:
            target, pattern = apply_converters(self.of_model(tensor), converters)
            converter = by_pattern[str(pattern)]
            converter.add_tensor(target, tensor, str(pattern), read(tensor))  # type: ignore[arg-type]
        made = converter.convert(target, model=self._model, config=self._model.config)
        value = made[name] if len(made) > 1 else next(iter(made.values()))
        return value[0] if isinstance(value, list) else value

    def with_and_without_prefix(self, name: str) -> Iterator[str]:
        """Names that transformers takes for `name`: files may leave out the model's prefix."""
        yield name
        yield (
            name.removeprefix(self._prefix)
            if name.startswith(self._prefix)
            else (self._prefix + name)
        )


def _shape(value: Tensor | list[Tensor]) -> tuple[int, ...]:
    return tuple((value[0] if isinstance(value, list) else value).shape)
