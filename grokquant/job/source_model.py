"""Which model a checkpoint is, in whatever form: a fingerprint of config, tokenizer and weights.

The same weights have the same fingerprint under other names, in other files and dtypes, as integers
or dequantized. So it hashes values, rounded to bfloat16, under the names of the family:

    all layers                   norms, biases, routers    whole
    outside the layers           embedding, head           some rows from first to last
    first, middle, last layer    matrices, one expert      a corner

Of Grok-1 as released 37 MB are read. Values that lie between two of bfloat16, such as its float32
norms, may differ in a float16 copy: they are rounded twice there.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import PreTrainedConfig

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.families.config import defines_the_model
from grokquant.families.tokenizer import VOCABULARIES, read_tokenizer
from grokquant.files.json_objects import read_json_object
from grokquant.job.shards import REPORT_NAME
from grokquant.types import QTensor, TensorRef

SCHEMA: Literal["grokquant.model/1"] = "grokquant.model/1"
KEY = "source_models"
# Kept tensors of up to so many values are hashed whole: routers have up to 2 million.
_WHOLE = 1 << 22
_ROWS = 16  # of a larger one, and of a corner
_COLUMNS = 64  # of a corner
_DIGITS = 16  # of a checksum: enough to tell models apart, short enough to be read
# Fields of a config for training, for other tasks, for text, and the form of the head.
_NOT_THE_MODEL = {
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "tie_word_embeddings",
}
# A tokenizer is told by how it cuts this: words, code, numbers, spaces, other scripts.
_PROBE = """The quick brown fox isn't 1234567.89 metres away; see https://example.org/a_b?c=1#d.
def f(x: int) -> list[str]:
    return [str(i ** 2) for i in range(x) if i != 0x1F]\t# naïve café, Übergröße, señor
Съешь ещё этих мягких французских булок. 敏捷的棕色狐狸 いろはにほへと 한국어 שלום مرحبا 🙂🚀
internationalization antidisestablishmentarianism AAAA    aaaa\n\n\n$$ \\frac{a}{b} $$
"""


class Tokens(BaseModel):
    """A tokenizer: the size of its vocabulary, and the checksum of how it cuts a known text."""

    model_config = ConfigDict(frozen=True)

    size: int
    sha256: str

    def __str__(self) -> str:
        return f"one of {self.size} tokens ({self.sha256[:6]})"


class ModelFingerprint(BaseModel):
    """What tells a model from another one.

    `config` are the fields of config.json that define the model, defaults included, `tokenizer` is
    None where there is none, and `tensors` has checksums of sampled values by tensor name.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_name: Literal["grokquant.model/1"] = Field(default=SCHEMA, alias="schema")
    family: str
    config: dict[str, Any]
    tokenizer: Tokens | None = None
    tensors: dict[str, str] = {}

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


def fingerprint_of(checkpoint: Checkpoint) -> ModelFingerprint:
    """The fingerprint of an opened checkpoint. Raises InputError where it cannot be read."""
    sampled = chain(_kept(checkpoint), _matrices(checkpoint))
    return _fingerprint(checkpoint, {name: _checksum(values) for name, values in sampled})


def kept_fingerprint_of(checkpoint: Checkpoint) -> ModelFingerprint:
    """The fingerprint of what quantization leaves as it is.

    Tensors of one value throughout are left out: norms of ones tell nothing.
    """
    telling = ((name, values) for name, values in _kept(checkpoint) if values.unique().numel() > 1)
    return _fingerprint(checkpoint, {name: _checksum(values) for name, values in telling})


def source_models(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What the report of a result says of its source: its fingerprint, then those of the models
    that the source itself was made from, each once."""
    models = [fingerprint_of(checkpoint), *recorded_models(checkpoint.source.path)]
    distinct = [model for number, model in enumerate(models) if model not in models[:number]]
    return [model.to_json() for model in distinct]


def recorded_models(directory: Path) -> list[ModelFingerprint]:
    """The models that the result in `directory` was made from; none if it does not say.

    Raises InputError where its report cannot be read.
    """
    path = directory / REPORT_NAME
    if not path.is_file():
        return []
    recorded = read_json_object(path).get(KEY, [])
    try:
        return [ModelFingerprint.model_validate(model) for model in recorded]
    except (ValidationError, TypeError):
        raise InputError(f"{path}: {KEY}: not written by this version") from None


def _fingerprint(checkpoint: Checkpoint, tensors: dict[str, str]) -> ModelFingerprint:
    fields = checkpoint.config.to_dict()
    source = checkpoint.source
    # Metadata of a file do not state all fields: a default there is no contradiction.
    stated = source.config if source.metadata else fields
    telling = {key: value for key, value in fields.items() if _tells(key) and key in stated}
    telling = PreTrainedConfig._encode_special_floats(telling)  # JSON has no infinity
    return ModelFingerprint(
        family=checkpoint.family.name,
        config=json.loads(json.dumps(telling, default=str)),  # as a report will have them
        tokenizer=_tokens(checkpoint),
        tensors=tensors,
    )


def _tells(key: str) -> bool:
    return defines_the_model(key) and key not in _NOT_THE_MODEL


def _tokens(checkpoint: Checkpoint) -> Tokens | None:
    names = {path.name for path in checkpoint.source.tokenizer_files}
    if names.isdisjoint(VOCABULARIES):
        return None
    tokenizer = read_tokenizer(checkpoint.source)
    cut = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return Tokens(size=len(tokenizer), sha256=_short(json.dumps(list(cut)).encode()))


def _kept(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Values of the tensors that are not quantized, but for biases of single experts."""
    matrices = {matrix.tensor for matrix in checkpoint.matrices()}
    family = checkpoint.family
    biases = {
        name
        for matrix in checkpoint.matrices()
        if matrix.expert is not None
        for name in family.expert_biases(matrix.layer, matrix.expert).values()
    }
    for name, ref in checkpoint.source.tensors.items():
        if name not in matrices and name not in biases:
            yield name, _whole(ref) if prod(ref.shape) <= _WHOLE else _spread(ref)


def _matrices(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """A corner of each matrix, but for other experts, of three layers."""
    last = checkpoint.num_layers - 1
    layers = {0, last // 2, last}
    for matrix in checkpoint.matrices():
        if matrix.layer in layers and not matrix.expert:
            rows, columns = checkpoint.source.tensors[matrix.tensor].shape
            corner = (slice(0, min(rows, _ROWS)), slice(0, min(columns, _COLUMNS)))
            yield matrix.tensor, _part(checkpoint.source.tensors[matrix.tensor], corner)


def _whole(ref: TensorRef) -> Tensor:
    return _part(ref, tuple(slice(0, size) for size in ref.shape))


def _spread(ref: TensorRef) -> Tensor:
    """Single rows at equal distances."""
    rows, *others = ref.shape
    rest = [slice(0, size) for size in others]
    first = range(0, rows, -(-rows // _ROWS))
    return torch.cat([_part(ref, (slice(row, row + 1), *rest)) for row in first])


def _part(ref: TensorRef, index: tuple[slice, ...]) -> Tensor:
    """Part of a tensor, read by itself where the source can; integers are dequantized in
    float32, which is exact, so that nothing is rounded twice."""
    if not index:  # a scalar
        return ref.read()
    if ref.load_part:
        return ref.load_part(index)
    rows, *columns = index
    if ref.load_rows:
        part = ref.load_rows(rows.start, rows.stop)
    else:
        stored = ref.load()
        part = _exact(stored.rows(rows)) if isinstance(stored, QTensor) else stored[rows]
    return part[(slice(None), *columns)]


def _exact(part: QTensor) -> Tensor:
    offsets = None if part.offsets is None else part.offsets.float()
    return replace(part, scales=part.scales.float(), offsets=offsets).dequantize()


def _checksum(values: Tensor) -> str:
    rounded = (values.bfloat16() + 0).contiguous()  # -0 becomes 0
    return _short(rounded.view(torch.int16).numpy().tobytes())


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]
