"""An opened checkpoint: its source, the family that runs it, and proof that it is complete."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from grokquant import containers, formats
from grokquant.errors import InputError
from grokquant.families import family_of
from grokquant.families.config import positions_of
from grokquant.families.family import Family
from grokquant.families.naming import matrix_of, renamed, with_tied_head, without_biases
from grokquant.memory import refused
from grokquant.sources import open_source
from grokquant.sources.located import located
from grokquant.toy import TOY, TOY_PATH
from grokquant.types import Matrix, Source, TensorRef

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.bool)
_NAMED = 20  # keys of a config, or places of tensors, in a note
# Tensors that older versions of transformers stored although they follow from the config.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
# Causal masks [1, 1, positions, positions], and the number [] that stands for minus infinity.
_MASK = re.compile(r"\b(attn|attention)\.(bias|masked_bias|causal_mask)$")


# `open_checkpoint`, or what remembers the checkpoints that it has opened: (path, config) -> one
Opener = Callable[[str | Path, str | Path | None], "Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A source whose tensors have the names and shapes that its family needs.

    `extra_tensors` names those that its model does not use, such as for multi-token prediction.
    """

    source: Source
    family: Family = field(repr=False)
    config: PreTrainedConfig = field(repr=False)
    extra_tensors: frozenset[str] = frozenset()

    def units(self) -> Iterator[tuple[str, TensorRef]]:
        """(unit name, reference) of every matrix that may be quantized, in layer order."""
        for matrix in self.matrices():
            yield matrix.name, self.source.tensors[matrix.tensor]

    def matrices(self) -> Iterator[Matrix]:
        """Every matrix that may be quantized, in layer order."""
        return self.family.units(self.config)

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines that a user should see: about the family, and about weights that are not read."""
        family = self.family.notice
        return (*([family] if family else []), *self.source.notes)

    @property
    def num_experts(self) -> int:
        """Routed experts of the layers that have any, 0 in a dense model."""
        layers = range(self.num_layers)
        return max(self.family.num_experts(self.config, layer) for layer in layers)

    @property
    def text_config(self) -> PreTrainedConfig:
        """The part of the config that describes the text model, in most models all of it."""
        return self.config.get_text_config()

    @property
    def experts_per_token(self) -> int:
        """Experts that a token is routed to, 1 in a dense model."""
        return getattr(self.text_config, "num_experts_per_tok", None) or 1

    def tokens_per_expert(self, tokens: int) -> int:
        """How many of `tokens` reach an expert on average; all in a dense model."""
        return tokens * self.experts_per_token // max(self.num_experts, 1)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.family.num_layers(self.config)

    @property
    def positions(self) -> int:
        """The most tokens that a text for the model may have."""
        return positions_of(self.text_config)

    @property
    def parameters(self) -> int:
        return sum(prod(ref.shape) for ref in self.source.tensors.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors that are read, to the byte."""
        return sum(ref.stored_bytes for ref in self.source.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files on disk: what every report calls the size of a model."""
        return sum(path.stat().st_size for path in self.source.weight_files)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the weight files per weight: codes, scales, headers and all else in them."""
        return 8 * self.file_bytes / self.parameters


def open_checkpoint(path: str | Path, config: str | Path | None = None) -> Checkpoint:
    """Opens a checkpoint of any supported kind and format; `toy` is the embedded toy.

    `path` is as in `located`. Reads headers only. `config` replaces the checkpoint's own
    config.json. Raises InputError if something is missing or has the wrong shape.
    """
    is_toy = str(path) == TOY
    directory = TOY_PATH if is_toy else located(path)
    config_path = Path(config) if config else None
    source = containers.opened(open_source(directory, config_path))
    if is_toy:
        source = replace(source, origin=replace(source.origin, name=TOY))
    family = family_of(source)
    source = renamed(formats.unpacked(source), family)
    config_path = config_path or directory / "config.json"
    notes = (*source.notes, *_left_out(config_path, family, source.config))
    source = replace(source, config=family.own_config(config_path, source.config), notes=notes)
    checkpoint = Checkpoint(source, family, family.config(config_path, source.config))
    return _complete(checkpoint)


def opener() -> Opener:
    """`open_checkpoint` that opens each only once, for the recipe and the plan of one call."""
    return cache(open_checkpoint)


def _left_out(path: Path, family: Family, config: dict) -> Iterator[str]:
    """A line that names the keys of a config.json that an output's does not have, if any."""
    names = family.left_out(config)
    if family.remote_code and config.get("auto_map") == family.remote_code.auto_map:
        names.remove("auto_map")  # of an output of ours: not read, but no news either
    if names:
        shown = ", ".join(name[:80] for name in names[:_NAMED])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"{path}: {family.name} has no such settings, left out: {shown}{more}"


def _complete(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the tensors that its model needs, and no others. Raises InputError."""
    source = checkpoint.source
    path = source.path
    # First without a model, since the config could claim more layers than fit into memory.
    needed = (matrix.tensor for matrix in checkpoint.matrices())
    if missing := next((name for name in needed if name not in source.tensors), None):
        raise InputError(f"{path}: tensor {missing} is missing")
    shapes = _expected_shapes(checkpoint)
    for name, shape in shapes.items():
        if name not in source.tensors:
            raise InputError(f"{path}: tensor {name} is missing")
        _check(path, source.tensors[name], shape, name in checkpoint.family.integers)
    return _without_unused(checkpoint, shapes.keys())


def without_extra_tensors(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without `extra_tensors`, and a note that names them."""
    extra = checkpoint.extra_tensors
    if not extra:
        return checkpoint
    source = checkpoint.source
    carried = _note_on_extra(checkpoint, "carried over as they are")
    left_out = _note_on_extra(checkpoint, "left out")
    notes = tuple(left_out if note == carried else note for note in source.notes)
    tensors = {name: ref for name, ref in source.tensors.items() if name not in extra}
    source = replace(source, tensors=tensors, notes=notes)
    return replace(checkpoint, source=source, extra_tensors=frozenset())


def _without_unused(checkpoint: Checkpoint, known: Set[str]) -> Checkpoint:
    """The checkpoint without tensors that are not `known`.

    Drops only what carries no information: a tied head, biases of zeros, computed buffers. What the
    family names as beyond the model is kept. Raises InputError for any other tensor.
    """
    source = checkpoint.source
    family = checkpoint.family
    for name, of in family.tied.items():
        if name in source.tensors and name not in known:
            source = with_tied_head(source, name, of)
    unknown = source.tensors.keys() - known
    biases = {name for name in unknown if _is_beside_packed(source, name)}
    computed = {name for name in unknown if _is_computed(source.tensors[name])}
    unread = unknown - biases - computed
    beyond = {name for name in unread if any(re.search(p, name) for p in family.beyond)}
    if others := sorted(unread - beyond):
        text = f"{source.path}: unexpected tensor {others[0]}: {family.name} has no such parameter"
        is_plain = "quantization_config" not in source.config
        if is_plain and family.model_class.__module__.startswith("transformers."):
            text += (
                "; is config.json of another model? If the tensor is not needed, loading and "
                "saving by transformers leaves it out"
            )
        raise InputError(text)
    source = without_biases(source, sorted(biases))
    kept = known | beyond
    tensors = {name: ref for name, ref in source.tensors.items() if name in kept}
    source = replace(source, tensors=tensors)
    checkpoint = replace(checkpoint, source=source, extra_tensors=frozenset(beyond))
    if not beyond:
        return checkpoint
    note = _note_on_extra(checkpoint, "carried over as they are")
    return replace(checkpoint, source=replace(source, notes=(*source.notes, note)))


def _note_on_extra(checkpoint: Checkpoint, fate: str) -> str:
    """The line that names tensors that the model does not use, and says what becomes of them."""
    names = checkpoint.extra_tensors
    groups = Counter(_place(name) for name in sorted(names))
    listed = [f"{count} in {place}" for place, count in groups.items()]
    shown = ", ".join(listed[:_NAMED])
    return (
        f"{checkpoint.source.path}: {len(names)} tensors are no part of {checkpoint.family.name} "
        f"in transformers, and are {fate} (output.extra_tensors): {shown}"
    )


def _place(name: str) -> str:
    """What a tensor belongs to: its name up to the first number, or its first word."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name.partition(".")[0]


def _is_beside_packed(source: Source, name: str) -> bool:
    """Whether a tensor is the bias of a matrix in a quantized checkpoint."""
    packed = source.config.get("quantization_config") is not None
    return packed and name.endswith(".bias") and matrix_of(name) in source.tensors


def _is_computed(ref: TensorRef) -> bool:
    """Whether a tensor that is no parameter follows from the config."""
    is_mask = _MASK.search(ref.name) and (not ref.shape or ref.shape[:2] == (1, 1))
    return bool(is_mask or _COMPUTED.search(ref.name))


def _check(path: Path, ref: TensorRef, shape: tuple[int, ...], whole: bool) -> None:
    if ref.shape != shape:
        raise InputError(
            f"{path}: {ref.name} has shape {list(ref.shape)}, config.json says {list(shape)}"
        )
    if ref.dtype not in (_INTEGERS if whole else _DTYPES):
        raise InputError(
            f"{path}: {ref.name} is {ref.dtype}, but config.json describes no scales for it"
        )


def _expected_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Checkpoint names and shapes of the tensors of the family's model."""
    # Values may fit one by one, and yet make no model.
    with refused(f"{checkpoint.source.path}: transformers makes no model of config.json"):
        return checkpoint.family.shapes(checkpoint.config)
