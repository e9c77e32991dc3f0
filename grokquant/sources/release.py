"""Grok-1 as released: ckpt-0/tensorNNNNN_000, one pickled array or int8 record per file.

Matrices are stored [in, out] with scales [groups, out], the experts of a layer as one stack:

    weight int8 [experts, in, out]     scales bfloat16 [experts, groups, out]

Here each expert is one [out, in] matrix under its Hugging Face name.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from grokquant.errors import InputError
from grokquant.files.links import refuse_link_out
from grokquant.grids import Scheme
from grokquant.sources.beside import files_beside, present
from grokquant.sources.finite import all_finite
from grokquant.sources.grok_config import CONFIG_OF_DIMENSION, complete_config, read_config
from grokquant.sources.holes import contradiction, find_hole
from grokquant.sources.kind import SourceKind
from grokquant.sources.left_aside import left_aside
from grokquant.sources.origin import origin_of
from grokquant.sources.pickles import ArrayHeader, read_array, read_headers
from grokquant.types import Origin, QTensor, Source, TensorRef

NAME = "release"
FILE_PATTERN = re.compile(r"tensor(\d{5})_(\d{3})")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
CHUNK_ROWS = 4096  # rows searched at a time for the first non-finite value
PUBLISHED_REPOSITORY = "xai-org/grok-1"
PUBLISHED_LICENCE = "apache-2.0"
MAX_LAYERS = 8000  # file names have five digits
DAMAGED = "the file is not whole: compare its checksum and download it again"

EMBEDDING = "language_model/in_out_embed"
FINAL_NORM = "language_model/rms_norm"


@dataclass(frozen=True)
class LeafSpec:
    """What a file of the release holds: dimensions by letter as stored, and its name here.

    V vocabulary, D hidden, E experts, F expert ffn, Q all query heads, K all key-value heads.
    """

    dimensions: str
    tensor: str
    quantized: bool = False


TOP = {
    EMBEDDING: LeafSpec("VD", "model.embed_tokens.weight"),
    FINAL_NORM: LeafSpec("D", "model.norm.weight"),
}
LAYER = {
    "moe/linear": LeafSpec("EDF", "block_sparse_moe.experts.{expert}.w1.weight", True),
    "moe/linear_1": LeafSpec("EFD", "block_sparse_moe.experts.{expert}.w2.weight", True),
    "moe/linear_v": LeafSpec("EDF", "block_sparse_moe.experts.{expert}.w3.weight", True),
    "multi_head_attention/key": LeafSpec("DK", "self_attn.k_proj.weight", True),
    "multi_head_attention/linear": LeafSpec("QD", "self_attn.o_proj.weight", True),
    "multi_head_attention/query": LeafSpec("DQ", "self_attn.q_proj.weight", True),
    "multi_head_attention/value": LeafSpec("DK", "self_attn.v_proj.weight", True),
    "rms_norm": LeafSpec("D", "pre_attn_norm.weight"),
    "rms_norm_1": LeafSpec("D", "post_attn_norm.weight"),
    "rms_norm_2": LeafSpec("D", "pre_moe_norm.weight"),
    "rms_norm_3": LeafSpec("D", "post_moe_norm.weight"),
    "router": LeafSpec("DE", "block_sparse_moe.gate.weight"),
}


@dataclass(frozen=True)
class _Stored:
    """A leaf of an opened release: its file, its name there and where its arrays lie."""

    path: Path
    name: str
    weight: ArrayHeader
    scales: ArrayHeader | None


def leaf_names(layers: int) -> list[str]:
    """Module paths of all leaves; the index of a path is the number of its file.

    The release sorts paths as strings: decoder_layer_10 comes before decoder_layer_2.
    """
    per_layer = (f"transformer/decoder_layer_{i}/{slot}" for i in range(layers) for slot in LAYER)
    return sorted([*TOP, *per_layer])


def file_name(index: int) -> str:
    return f"tensor{index:05d}_000"


def recognizes(path: Path) -> bool:
    """Whether `path` or its ckpt-0 holds release files, or is called ckpt-0."""
    directory = _checkpoint_directory(path)
    return directory.name == "ckpt-0" or any(map(_is_tensor_file, directory.glob("tensor*")))


def open_source(path: Path, config_path: Path | None = None) -> Source:
    """Opens the release at `path`, the directory of ckpt-0 or ckpt-0 itself.

    Only headers are read. Raises InputError for missing, extra, malformed or misshapen files and
    for a configuration that is incomplete or contradicts them.
    """
    directory = _checkpoint_directory(path)
    places = [directory, directory.parent] if directory.name == "ckpt-0" else [directory]
    config_path = config_path or _first_file(places, "config.json")
    given = read_config(config_path) if config_path else {}
    stored = _read_leaves(directory, given.get("num_hidden_layers"))
    dimensions = _check_shapes(stored)
    layers = (len(stored) - len(TOP)) // len(LAYER)
    derived = {name: dimensions[letter] for letter, name in CONFIG_OF_DIMENSION.items()}
    derived |= {"num_hidden_layers": layers}
    attention = {"q_proj": dimensions["Q"], "kv_proj": dimensions["K"]}
    config, published = complete_config(config_path or directory, given, derived, attention)
    tokenizer = [_first_file(places, name) for name in TOKENIZER_FILES]
    beside = files_beside(path)
    return Source(
        path=path,
        kind=NAME,
        config=config,
        tensors={ref.name: ref for leaf in stored for ref in _refs(leaf)},
        tokenizer_files=present(file for file in tokenizer if file),
        weight_files=tuple(leaf.path for leaf in stored),
        origin=_origin(path, given, beside, published),
        beside=beside,
        notes=left_aside(path, ()),
    )


def _origin(path: Path, config: dict, beside: Mapping[str, Path], published: bool) -> Origin:
    """What the directory says; what is published, if the shapes are those of Grok-1."""
    found = origin_of(path, config, beside)
    if not published:
        return found
    name = PUBLISHED_REPOSITORY.partition("/")[2]
    return replace(found, name=name, base_model=PUBLISHED_REPOSITORY, licence=PUBLISHED_LICENCE)


def _checkpoint_directory(path: Path) -> Path:
    return path / "ckpt-0" if (path / "ckpt-0").is_dir() else path.absolute()


def _first_file(places: list[Path], name: str) -> Path | None:
    found = next((place / name for place in places if os.path.lexists(place / name)), None)
    if found:
        refuse_link_out(found, found.parent)
    return found


def _is_tensor_file(path: Path) -> bool:
    return FILE_PATTERN.fullmatch(path.name) is not None


def _read_leaves(directory: Path, layers: int | None) -> list[_Stored]:
    found = {path.name for path in directory.glob("tensor*") if _is_tensor_file(path)}
    if not found:
        raise InputError(f"{directory}: no release files such as {file_name(0)}")
    if layers is None:
        last = max(int(name[6:11]) for name in found)
        layers = -(-(last + 1 - len(TOP)) // len(LAYER))
    if layers > MAX_LAYERS:
        raise InputError(f"{directory}: {len(found)} files, too few for {layers} layers")
    names = leaf_names(layers)
    files = [file_name(index) for index in range(len(names))]
    complaint = f"a model of {layers} layers has {len(files)} files"
    _refuse_any(directory, sorted(set(files) - found), f"missing; {complaint}")
    _refuse_any(directory, sorted(found - set(files)), f"unexpected; {complaint}")
    pairs = zip(files, names, strict=True)
    return [_read_leaf(directory / file, name) for file, name in pairs]


def _refuse_any(directory: Path, files: list[str], complaint: str) -> None:
    if files:
        others = f" and {len(files) - 3} more" if len(files) > 3 else ""
        raise InputError(f"{directory}: {', '.join(files[:3])}{others}: {complaint}")


def _read_leaf(path: Path, name: str) -> _Stored:
    weight, *rest = read_headers(path)
    scales = rest[0] if rest else None
    if _leaf(name).quantized:
        dtypes = ("int8", "bfloat16")
        if scales is None or (weight.dtype, scales.dtype) != dtypes:
            raise InputError(f"{path}: {name} must hold an int8 weight and bfloat16 scales")
    elif scales is not None or weight.dtype != "float32":
        raise InputError(f"{path}: {name} must hold one float32 array")
    return _Stored(path, name, weight, scales)


def _split(name: str) -> tuple[str, str]:
    """transformer/decoder_layer_3/moe/linear -> ("model.layers.3.", "moe/linear")."""
    if name in TOP:
        return "", name
    _, layer, slot = name.split("/", 2)
    return f"model.layers.{layer.removeprefix('decoder_layer_')}.", slot


def _leaf(name: str) -> LeafSpec:
    return (TOP | LAYER)[_split(name)[1]]


def _check_shapes(stored: list[_Stored]) -> dict[str, int]:
    """Sizes by letter, each taken from the first file that has it. Raises InputError where another
    file contradicts."""
    sizes: dict[str, int] = {}
    for item in stored:
        letters = _leaf(item.name).dimensions
        shape = item.weight.shape
        if len(shape) == len(letters):
            sizes = dict(zip(letters, shape, strict=True)) | sizes
        expected = tuple(sizes.get(letter, letter) for letter in letters)
        if shape != expected:
            raise InputError(f"{item.path}: {item.name} has shape {shape}, expected {expected}")
        if item.scales is not None:
            _check_scales(item, item.scales.shape)
    return sizes


def _check_scales(item: _Stored, shape: tuple[int, ...]) -> None:
    *lead, rows, columns = item.weight.shape
    fits = len(shape) == len(lead) + 2 and shape == (*lead, shape[-2], columns)
    if not fits or rows % shape[-2]:
        expected = (*lead, f"a divisor of {rows}", columns)
        raise InputError(f"{item.path}: {item.name} has scales {shape}, expected {expected}")


def _refs(item: _Stored) -> list[TensorRef]:
    prefix, slot = _split(item.name)
    name = prefix + _leaf(item.name).tensor
    if item.scales is None:
        return [_dense_ref(item, name)]
    if slot.startswith("moe/"):
        experts = range(item.weight.shape[0])
        return [_quantized_ref(item, name.format(expert=e), e) for e in experts]
    return [_quantized_ref(item, name, None)]


def _dense_ref(item: _Stored, name: str) -> TensorRef:
    nbytes = item.weight.nbytes
    if item.name.endswith("/router"):
        shape = item.weight.shape[::-1]
        load = partial(_load_transposed, item)
        load_part = partial(_transposed_part, item)
        return TensorRef(name, shape, torch.float32, nbytes, load, load_part=load_part)
    shape = item.weight.shape
    load_rows = partial(_load_rows, item)
    load = partial(load_rows, 0, shape[0])
    return TensorRef(name, shape, torch.float32, nbytes, load, load_rows=load_rows)


def _load_transposed(item: _Stored) -> Tensor:
    return _load_rows(item, 0, item.weight.shape[0]).T.contiguous()


def _transposed_part(item: _Stored, index: tuple[slice, ...]) -> Tensor:
    rows, columns = index
    first, stop, _ = columns.indices(item.weight.shape[0])
    return _load_rows(item, first, stop).T[rows].contiguous()


def _load_rows(item: _Stored, first: int, stop: int) -> Tensor:
    rows = read_array(item.path, item.weight, first, stop)
    _refuse_nonfinite(item, rows, "", first)
    _refuse_holes(item, rows, first)
    return rows


def _quantized_ref(item: _Stored, name: str, expert: int | None) -> TensorRef:
    assert item.scales is not None
    rows, columns = item.weight.shape[-2:]
    groups = item.scales.shape[-2]
    return TensorRef(
        name=name,
        shape=(columns, rows),
        dtype=torch.bfloat16,
        stored_bytes=rows * columns + groups * columns * torch.bfloat16.itemsize,
        load=partial(_load_quantized, item, expert),
        load_into=partial(_load_quantized, item, expert),
        load_part=partial(_load_part, item, expert or 0),
        scheme=_scheme(rows, groups),
    )


def _load_quantized(item: _Stored, expert: int | None, into: Tensor | None = None) -> QTensor:
    """Codes and scales as transposed views of the stored arrays, which are not copied."""
    assert item.scales is not None
    first, stop = (0, None) if expert is None else (expert, expert + 1)
    weight = read_array(item.path, item.weight, first, stop, into)
    scales = read_array(item.path, item.scales, first, stop)
    _refuse_holes(item, weight.flatten(0, -2), first * item.weight.shape[-2])
    if expert is not None:
        weight = weight[0]  # (in, out)
        scales = scales[0]  # (groups, out)
    _refuse_nonfinite(item, scales, f" scales{_of(expert)}")
    if complaint := contradiction(weight, scales):
        raise InputError(f"{item.path}: {item.name}{_of(expert)}: {complaint}; {DAMAGED}")
    return QTensor(weight.T, scales.T, _scheme(len(weight), len(scales)))


def _load_part(item: _Stored, expert: int, index: tuple[slice, ...]) -> Tensor:
    """Some rows and columns of a matrix [out, in], dequantized; reads those columns alone."""
    assert item.scales is not None
    features = item.weight.shape[-2]
    groups = item.scales.shape[-2]
    size = features // groups
    rows, columns = index
    first, stop, _ = columns.indices(features)
    codes = _read_flat(item.path, item.weight, expert * features + first, stop - first)
    group_of = torch.arange(first, stop) // size
    scales = _read_flat(item.path, item.scales, expert * groups, groups)
    _refuse_nonfinite(item, scales, f" scales{_of(expert)}")
    part = codes.to(scales.dtype) * scales[group_of]  # (columns, out)
    return part.T[rows].contiguous()


def _read_flat(path: Path, header: ArrayHeader, first: int, count: int) -> Tensor:
    """Rows of an array as if the matrices of a stack lay one below the other: [count, out]."""
    flat = replace(header, shape=(prod(header.shape[:-1]), header.shape[-1]))
    return read_array(path, flat, first, first + count)


def _of(expert: int | None) -> str:
    return "" if expert is None else f" of expert {expert}"


def _scheme(columns: int, groups: int) -> Scheme:
    return Scheme(bits=8, group_size=None if groups == 1 else columns // groups)


def _refuse_nonfinite(item: _Stored, values: Tensor, what: str, first_row: int = 0) -> None:
    """Raises InputError with the first index, that of the file's array, of a value in `values`."""
    count = 0
    first: tuple[int, ...] = ()
    for start in range(0, len(values), CHUNK_ROWS):
        rows = values[start : start + CHUNK_ROWS]
        if all_finite(rows):
            continue
        bad = ~rows.isfinite()
        if count == 0:
            row, *rest = bad.nonzero()[0].tolist()
            first = (first_row + start + row, *rest)
        count += int(bad.sum())
    if count:
        raise InputError(
            f"{item.path}: {item.name}{what}: {count} values are NaN or infinite, first at {first}"
        )


def _refuse_holes(item: _Stored, rows: Tensor, first_row: int) -> None:
    """Raises InputError with the bytes of the file that were never written; `rows` are [.., n]."""
    raw = rows.view(-1).view(torch.uint8).numpy()
    row_bytes = rows.shape[-1] * rows.dtype.itemsize
    hole = find_hole(raw, row_bytes)
    if hole is not None:
        start = item.weight.offset + first_row * row_bytes
        raise InputError(
            f"{item.path}: {item.name}: bytes {start + hole.start} to {start + hole.stop - 1} are "
            f"all zero; {DAMAGED}"
        )


KIND = SourceKind(
    name=NAME,
    looks_for="ckpt-0/tensor00000_000",
    recognizes=recognizes,
    open_source=open_source,
)
