"""Files of tensor-parallel ranks, the form of SGLang's Grok checkpoints: the same names in each.

`X-TP-000.safetensors`, `X-TP-001.safetensors`, ... hold each rank's part of the tensors that are
split, `X-TP-common.safetensors` the tensors that all ranks share.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.types import TensorRef

RANK_FILE = re.compile(r".+-TP-(\d{3}|common)\.safetensors")
COMMON = "common"
# These are split by input features, all other matrices by output features.
_BY_INPUT = re.compile(r"\.(w2|linear_1|down_proj|o_proj|multi_head_attention\.linear)\.weight$")
# Every rank holds these whole.
_WHOLE = re.compile(r"\.(gate|router)\.weight$")


def is_presharded(path: Path) -> bool:
    """Whether the directory `path` holds rank files."""
    return any(RANK_FILE.fullmatch(file.name) for file in path.glob("*-TP-*.safetensors"))


def rank_files(path: Path) -> list[str]:
    """The names of all rank files. Raises InputError where a rank is missing."""
    names = sorted(file.name for file in path.iterdir() if RANK_FILE.fullmatch(file.name))
    numbers = sorted({_rank(name) for name in names} - {COMMON})
    for expected, number in enumerate(numbers):
        if int(number) != expected:
            raise InputError(f"{path}: has files of rank {number}, but none of rank {expected:03d}")
    return names


def joined(path: Path, by_file: Mapping[str, list[TensorRef]]) -> list[TensorRef]:
    """The whole tensors of the rank files in `path`.

    Raises InputError where a rank lacks its part of a tensor or has one of another shape.
    """
    ranks = sorted({_rank(file) for file in by_file} - {COMMON})
    parts: dict[str, dict[str, TensorRef]] = {}
    for file, refs in by_file.items():
        for ref in refs:
            of_ranks = parts.setdefault(ref.name, {})
            if _rank(file) in of_ranks or COMMON in of_ranks:
                raise InputError(f"{path / file}: tensor {ref.name!r} is also in another file")
            of_ranks[_rank(file)] = ref
    return [_whole(path, name, of_ranks, ranks) for name, of_ranks in parts.items()]


def _whole(path: Path, name: str, parts: dict[str, TensorRef], ranks: list[str]) -> TensorRef:
    if list(parts) == [COMMON]:
        return parts[COMMON]
    for rank in ranks:
        if rank not in parts:
            raise InputError(f"{path}: the files of rank {rank} have no tensor {name!r}")
    refs = [parts[rank] for rank in ranks]
    first = refs[0]
    axis = 1 if _BY_INPUT.search(name) else 0
    if len(first.shape) == 1 or _WHOLE.search(name):
        _check_alike(path, refs, None)
        return first.loaded_by(lambda: _same(path, refs))
    _check_alike(path, refs, axis)
    shape = list(first.shape)
    shape[axis] = sum(ref.shape[axis] for ref in refs)
    size = sum(ref.stored_bytes for ref in refs)
    load = lambda: torch.cat([ref.read() for ref in refs], axis)  # noqa: E731
    return TensorRef(name, tuple(shape), first.dtype, size, load)


def _check_alike(path: Path, refs: list[TensorRef], axis: int | None) -> None:
    """Raises InputError where parts differ in more than their size along `axis`."""
    forms = [
        (ref.dtype, len(ref.shape), *(size for i, size in enumerate(ref.shape) if i != axis))
        for ref in refs
    ]
    for rank, (form, ref) in enumerate(zip(forms, refs, strict=True)):
        if form != forms[0]:
            raise InputError(
                f"{path}: {ref.name} is {ref.dtype} {list(ref.shape)} in the files of rank "
                f"{rank:03d}, {refs[0].dtype} {list(refs[0].shape)} in those of rank 000"
            )


def _same(path: Path, refs: list[TensorRef]) -> Tensor:
    first, *others = (ref.read() for ref in refs)
    for rank, other in enumerate(others, 1):
        if not torch.equal(first, other):
            raise InputError(f"{path}: {refs[0].name} differs between rank 000 and rank {rank:03d}")
    return first


def _rank(file: str) -> str:
    found = RANK_FILE.fullmatch(file)
    assert found, file
    return found[1]
