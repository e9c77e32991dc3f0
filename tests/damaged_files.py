"""Damaged inputs of every kind: what is done to a good model, and the words that name the place.

A case is a change of one file of a small Llama and the words that its refusal must contain beside
the name of that file.
"""

import gzip
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from grokquant.containers.gguf_names import ARCHITECTURES, OUTSIDE
from grokquant.files.gguf_header import GgufTensor, gguf_layout

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LAYER = "model.layers.0."
SHAPES = {
    "lm_head.weight": (48, 32),
    "model.embed_tokens.weight": (48, 32),
    f"{LAYER}input_layernorm.weight": (32,),
    f"{LAYER}mlp.down_proj.weight": (32, 64),
    f"{LAYER}mlp.gate_proj.weight": (64, 32),
    f"{LAYER}mlp.up_proj.weight": (64, 32),
    f"{LAYER}post_attention_layernorm.weight": (32,),
    f"{LAYER}self_attn.k_proj.weight": (16, 32),
    f"{LAYER}self_attn.o_proj.weight": (32, 32),
    f"{LAYER}self_attn.q_proj.weight": (32, 32),
    f"{LAYER}self_attn.v_proj.weight": (16, 32),
    "model.norm.weight": (32,),
}
NORM = "model.norm.weight"  # the last one in the file
FIRST = "lm_head.weight"
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"

Act = Callable[[Path], object]  # changes a file
Case = tuple[Act, str]


def entries() -> dict:
    """The header of all tensors as float32."""
    header = {}
    end = 0
    for name, shape in SHAPES.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return header


DATA = bytes(max(entry["data_offsets"][1] for entry in entries().values()))


def safetensors(header: object, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def gguf_name(name: str) -> str:
    within = ARCHITECTURES["LlamaForCausalLM"].within
    return OUTSIDE.get(name) or f"blk.0.{within[name.removeprefix(LAYER)]}"


def gguf_tensors() -> list[GgufTensor]:
    return [GgufTensor(gguf_name(name), "F32", shape) for name, shape in SHAPES.items()]


def gguf(tensors: list[GgufTensor] | None = None, **pairs: object) -> bytes:
    """A file of these tensors, zeros."""
    metadata = {"general.architecture": "llama"} | {
        k.replace("__", "."): v for k, v in pairs.items()
    }
    layout = gguf_layout(metadata, gguf_tensors() if tensors is None else tensors)
    return layout.header + bytes(layout.size - len(layout.header))


def write_llama(directory: Path, kind: str) -> Path:
    """Writes the model as "safetensors", "index" or "gguf"; returns the file with its header."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    if kind == "gguf":
        path = directory / "x.gguf"
        path.write_bytes(gguf())
        return path
    path = directory / ("model.safetensors" if kind == "safetensors" else SHARD)
    path.write_bytes(safetensors(entries()))
    if kind == "index":
        path = directory / INDEX
        path.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(SHAPES, SHARD)}))
    return path


# --- changes


def bytes_of(content: bytes) -> Act:
    return lambda path: path.write_bytes(content)


def edit(change: Callable[[bytes], bytes]) -> Act:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def swap(old: bytes, new: bytes) -> Act:
    """Replaces the only occurrence of `old`."""

    def act(path: Path) -> None:
        raw = path.read_bytes()
        assert raw.count(old) == 1, (old, raw.count(old))
        path.write_bytes(raw.replace(old, new))

    return act


def with_header(content: object, data: bytes = DATA) -> Act:
    return bytes_of(safetensors(content, data))


def length(change: Callable[[int], int]) -> Act:
    """Changes what a safetensors file says of the length of its header."""

    def changed(raw: bytes) -> bytes:
        said = int.from_bytes(raw[:8], "little")
        return struct.pack("<Q", change(said)) + raw[8:]

    return edit(changed)


def header(change: Callable[[dict], object], data: bytes = DATA) -> Act:
    """Changes the dictionary of a safetensors header."""

    def act(path: Path) -> None:
        content = entries()
        change(content)
        path.write_bytes(safetensors(content, data))

    return act


def entry(**changes: object) -> Act:
    """Changes fields of the last tensor; ... removes one."""

    def change(content: dict) -> None:
        content[NORM] |= changes
        for field in [field for field, value in changes.items() if value is ...]:
            del content[NORM][field]

    return header(change)


def json_with(**changes: object) -> Act:
    """Sets keys of a JSON file; ... removes one."""

    def act(path: Path) -> None:
        content = json.loads(path.read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not ...}
        path.write_text(json.dumps(kept))

    return act


def sparse(path: Path) -> None:
    path.unlink()
    path.touch()
    os.truncate(path, 5 << 30)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to(target: str) -> Act:
    return lambda path: (path.unlink(), path.symlink_to(target))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4932000000\n"
# What may stand in place of any file.
ANYTHING: dict[str, Case] = {
    "a Git LFS pointer": (bytes_of(LFS), "is a Git LFS pointer"),
    "a web page": (bytes_of(b"<!DOCTYPE html><html>404</html>"), "is a web page"),
    "a server's answer": (bytes_of(b"Entry not found"), "holds a server's answer"),
    "empty": (bytes_of(b""), ""),
    "one byte": (bytes_of(b"{"), ""),
    "zeros": (bytes_of(bytes(1000)), ""),
    "compressed": (edit(gzip.compress), ""),
    "a pickle": (bytes_of(pickle.dumps({"a": [1]})), ""),
    "a zip": (bytes_of(b"PK\x03\x04" + bytes(200)), ""),
    "half": (edit(lambda raw: raw[: len(raw) // 2]), ""),
    "a FIFO": (fifo, "it is a FIFO"),
    "a directory": (folder, ""),
    "a link out": (link_to("/etc/passwd"), "is a link that leads out"),
    "a link to nothing": (link_to("nowhere"), ""),
    "a link to itself": (link_to("config.json"), ""),
    "sparse, 5 GB": (sparse, ""),
}  # fmt: skip
DEEP = b"[" * 100_000

TEXT = json.dumps(entries())
SIZES = (24_999_999, 25_000_001, 100_000_001, 1 << 32, 1 << 63, (1 << 64) - 1)
UP = f"{LAYER}mlp.up_proj.weight"
BEYOND = {"dtype": "U8", "shape": [1], "data_offsets": [len(DATA), len(DATA) + 1]}

SAFETENSORS: dict[str, Case] = {
    "seven bytes": (edit(lambda raw: raw[:7]), "truncated"),
    "only a length": (edit(lambda raw: raw[:8]), "truncated"),
    "length 0": (length(lambda said: 0), "header"),
    "length 1": (length(lambda said: 1), "header"),
    "length one too short": (length(lambda said: said - 1), "header"),
    "length one too long": (length(lambda said: said + 1), "header"),
    **{f"length {size:,}": (length(lambda said, size=size: size), "header") for size in SIZES},
    "half of the header": (edit(lambda raw: raw[:500]), "truncated"),
    "no data": (with_header(entries(), b""), ""),
    "half of the data": (edit(lambda raw: raw[:-10_000]), ""),
    "a byte less": (edit(lambda raw: raw[:-1]), ""),
    "a byte more": (edit(lambda raw: raw + b"\0"), ""),
    "header not JSON": (with_header(b'{"a": '), "header"),
    "header a list": (with_header(b"[]"), "header"),
    "header a text": (with_header(b'"a"'), "header"),
    "header null": (with_header(b"null"), "header"),
    "header in UTF-16": (with_header(TEXT.encode("utf-16")), "header"),
    "header not UTF-8": (with_header(TEXT.encode().replace(b"lm_head", b"lm_hea\xff")), "header"),
    "header deep": (with_header(b'{"a":' + DEEP), "header: not valid JSON"),
    "header NaN": (with_header(b'{"a": NaN}'), "header"),
    "header with a comma more": (with_header(TEXT.encode()[:-1] + b",}"), "header"),
    "no tensor": (with_header({}, b""), "0 tensors"),
    "only metadata": (with_header({"__metadata__": {"a": "b"}}, b""), "0 tensors"),
    "a tensor twice": (
        with_header(TEXT.replace(NORM, FIRST).encode()), f"key '{FIRST}' occurs twice",
    ),
    "a field twice": (
        with_header(TEXT.replace('"dtype"', '"shape"').encode()), "key 'shape' occurs twice",
    ),
    "metadata a list": (header(lambda content: content.update(__metadata__=[])), ""),
    "metadata a number": (header(lambda content: content.update(__metadata__={"a": 1})), ""),
    "entry null": (header(lambda content: content.update({NORM: None})), ""),
    "entry a list": (header(lambda content: content.update({NORM: ["F32", [32], [0, 128]]})), ""),
    "dtype missing": (entry(dtype=...), ""),
    "dtype unknown": (entry(dtype="I3"), ""),
    "dtype a number": (entry(dtype=4), ""),
    "dtype in small letters": (entry(dtype="f32"), ""),
    "dtype of another size": (entry(dtype="F16"), ""),
    "dtype of four bits": (entry(dtype="F4", shape=[256]), ""),
    "shape missing": (entry(shape=...), ""),
    "shape negative": (entry(shape=[-32]), ""),
    "shape a fraction": (entry(shape=[32.0]), ""),
    "shape a text": (entry(shape="32"), ""),
    "shape nested": (entry(shape=[[32]]), ""),
    "shape too large": (entry(shape=[33]), ""),
    "shape of 2^64": (entry(shape=[1 << 64]), ""),
    "shape that overflows to its size": (entry(shape=[(1 << 62) + 8, 4]), ""),
    "shape of 2^64 - 1 and 0": (entry(shape=[(1 << 64) - 1, 0], data_offsets=[0, 0]), ""),
    "offsets missing": (entry(data_offsets=...), ""),
    "one offset": (entry(data_offsets=[0]), ""),
    "three offsets": (entry(data_offsets=[0, 64, 128]), ""),
    "offset negative": (entry(data_offsets=[-128, 0]), ""),
    "offsets backwards": (entry(data_offsets=[128, 0]), ""),
    "offset a fraction": (entry(data_offsets=[0.5, 128.5]), ""),
    "offsets beyond the file": (entry(data_offsets=[1 << 40, (1 << 40) + 128]), ""),
    "offsets overlap": (entry(data_offsets=[0, 128]), ""),
    "a hole at the start": (header(lambda content: content.pop(FIRST)), ""),
    "a hole within": (header(lambda content: content.pop(UP)), ""),
    "a tensor missing": (
        header(lambda content: content.pop(NORM), DATA[:-128]), f"{NORM} is missing",
    ),
    "a path for a name": (
        header(lambda content: content.update({"../../x": BEYOND}), DATA + b"\0"), "../../x",
    ),
    "a field too many": (entry(x=1), f"'{NORM}' must have"),
    "no values": (entry(shape=[0], data_offsets=[0, 0]), f"'{NORM}' has shape [0]"),
    "another shape": (entry(shape=[4, 8]), f"{NORM} has shape [4, 8]"),
}  # fmt: skip


def tensors_with(place: int, **changes: object) -> Act:
    """A GGUF file whose tensor at `place` is another."""
    tensors = gguf_tensors()
    tensors[place] = GgufTensor(**(vars(tensors[place]) | changes))
    return bytes_of(gguf(tensors))


def info(
    dims: tuple[int, ...] = (32,), kind: int = 0, offset: int | None = None, **more: int
) -> Act:
    """Changes what the header says of its last tensor, of 32 float32."""
    name = gguf_name(NORM).encode()
    start = len(DATA) - 128 if offset is None else offset
    said = struct.pack(f"<I{len(dims)}QIQ", more.get("rank", len(dims)), *dims, kind, start)
    old = struct.pack("<IQIQ", 1, 32, 0, len(DATA) - 128)
    return swap(name + old, name + said)


def counts(tensors: int = len(SHAPES), pairs: int = 1, version: int = 3) -> Act:
    said = struct.pack("<IQQ", version, tensors, pairs)
    return edit(lambda raw: raw[:4] + said + raw[24:])


def pair(kind: int, value: bytes, key: bytes = b"x") -> Act:
    """A file with one more pair of metadata."""
    more = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    return edit(lambda raw: raw[:4] + struct.pack("<IQQ", 3, len(SHAPES), 2) + more + raw[24:])


def alignment(value: int, kind: int = 4) -> Act:
    return pair(kind, struct.pack("<I", value), b"general.alignment")


GGUF: dict[str, Case] = {
    "magic of GGML": (edit(lambda raw: b"lmgg" + raw[4:]), "begins with b'lmgg'"),
    **{f"version {v}": (counts(version=v), f"version {v} is") for v in (0, 1, 2, 4, 1 << 31)},
    "big endian": (edit(lambda raw: b"GGUF" + struct.pack(">IQQ", 3, 12, 1) + raw[24:]), "version"),
    **{
        f"{count:,} tensors": (counts(tensors=count), "")
        for count in (0, 1, 11, 13, 100_001, 1 << 32, 1 << 63, (1 << 64) - 1)
    },
    **{
        f"{count:,} pairs": (counts(pairs=count), "")
        for count in (0, 2, 65_537, 1 << 32, (1 << 64) - 1)
    },
    "cut within the magic": (edit(lambda raw: raw[:3]), ""),
    "cut within the counts": (edit(lambda raw: raw[:20]), "ends within its header"),
    "cut within a key": (edit(lambda raw: raw[:40]), "ends within its header"),
    "cut within a tensor": (edit(lambda raw: raw[:200]), "ends within its header"),
    "cut within the data": (edit(lambda raw: raw[:-64]), "truncated"),
    "cut by a byte": (edit(lambda raw: raw[:-1]), "truncated"),
    "a key twice": (
        pair(8, struct.pack("<Q", 1) + b"a", b"general.architecture"),
        "'general.architecture' occurs twice",
    ),
    "a long key": (pair(0, b"\0", b"k" * 65_536), "65536 bytes of a string"),
    "a value of no type": (pair(13, bytes(8)), "unknown type 13"),
    "an array of arrays": (pair(9, struct.pack("<IQIQ", 9, 1, 4, 0)), "array of type 9"),
    "an array of no type": (pair(9, struct.pack("<IQ", 77, 1)), "array of type 77"),
    "an array of 2^60": (pair(9, struct.pack("<IQ", 10, 1 << 60)), "items in its header"),
    "an array longer than the file": (pair(9, struct.pack("<IQ", 0, 1 << 20)), "ends within"),
    "2^60 strings": (pair(9, struct.pack("<IQ", 8, 1 << 60)), "strings in its header"),
    "a string of 2^63": (pair(8, struct.pack("<Q", 1 << 63)), "bytes of a string"),
    "a string longer than the file": (pair(8, struct.pack("<Q", 1 << 20)), "ends within"),
    **{
        f"alignment {value:,}": (alignment(value), f"general.alignment is {value}")
        for value in (0, 1, 33, 48, 1 << 31)
    },
    "alignment in 64 bits": (alignment(64, 10), "general.alignment has type 10"),
    "alignment not kept": (alignment(128), ""),
    "a tensor twice": (tensors_with(1, name=gguf_name(FIRST)), "occurs twice"),
    "a long name": (tensors_with(1, name="n" * 129), "129 bytes of a string"),
    "a name of nobody": (tensors_with(1, name="blk.0.\x1b[2J"), "embed_tokens.weight is missing"),
    "another layer": (tensors_with(5, name="blk.7.ffn_up.weight"), "up_proj.weight is missing"),
    "another shape": (tensors_with(11, shape=(4, 8)), "has shape"),
    "no dimensions": (info(dims=()), "0 dimensions"),
    "five dimensions": (info(dims=(32, 1, 1, 1, 1)), "5 dimensions"),
    "2^32 dimensions": (info(rank=(1 << 32) - 1), "4294967295 dimensions"),
    "a dimension of 0": (info(dims=(0,)), "shape [0]"),
    "a dimension of 2^63": (info(dims=(1 << 63,)), "shape ["),
    "dimensions that overflow": (info(dims=(1 << 32, 1 << 32)), "shape ["),
    "a type that was removed": (info(kind=4), "unknown type 4"),
    "a type of the future": (info(kind=4000), "unknown type 4000"),
    "rows that fill no block": (info(dims=(40,), kind=8), "do not divide into blocks"),
    "larger than the file": (info(dims=(64,)), "truncated"),
    "a hole before it": (info(offset=len(DATA) - 128 + 32), "is said to begin"),
    "an overlap": (info(offset=0), "is said to begin"),
    "an odd offset": (info(offset=len(DATA) - 127), "is said to begin"),
    "an offset of 2^63": (info(offset=1 << 63), "is said to begin"),
    "an offset that wraps": (info(offset=(1 << 64) - 64), "is said to begin"),
}  # fmt: skip


def maps_to(file: object) -> Act:
    return json_with(weight_map={FIRST: file})


INDEXES: dict[str, Case] = {
    "a list": (bytes_of(b"[]"), "expected a JSON object"),
    "deep": (bytes_of(b'{"weight_map":' + DEEP), "nested more than 64 deep"),
    "in UTF-16": (edit(lambda raw: raw.decode().encode("utf-16")), "not valid JSON"),
    "a comment": (edit(lambda raw: b"// comment\n" + raw), "not valid JSON"),
    "two objects": (edit(lambda raw: raw + raw), "not valid JSON"),
    "a long number": (bytes_of(b'{"metadata": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "infinity": (swap(b'"metadata": {}', b'"metadata": 1e999'), "metadata"),
    "half a character": (swap(b'"metadata": {}', b'"metadata": "\\ud800"'), "metadata"),
    "a key twice": (
        edit(lambda raw: raw.replace(NORM.encode(), FIRST.encode())),
        f"key '{FIRST}' occurs twice",
    ),
    "no map": (json_with(weight_map=...), "weight_map"),
    "the map a list": (json_with(weight_map=[SHARD]), "weight_map"),
    "the map a text": (json_with(weight_map=SHARD), "weight_map"),
    "the map empty": (json_with(weight_map={}), "weight_map"),
    "a number for a file": (maps_to(1), "'1' is not a plain"),
    "a list for a file": (maps_to([SHARD]), "is not a plain"),
    "a path up": (maps_to("../x.safetensors"), "'../x.safetensors' is not a plain"),
    "a path from the root": (maps_to("/tmp/x.safetensors"), "is not a plain"),
    "a path of Windows": (maps_to("C:\\x.safetensors"), "is not a plain"),
    "a share of Windows": (maps_to("\\\\srv\\x.safetensors"), "is not a plain"),
    "a hidden file": (maps_to(".x.safetensors"), "is not a plain"),
    "a pickle for a file": (maps_to("pytorch_model.bin"), "is not a plain"),
    "a null byte": (maps_to("x\0.safetensors"), "is not a plain"),
    "a newline": (maps_to("x.safetensors\n"), "is not a plain"),
    "an escape": (maps_to("\x1b[2J.safetensors"), "is not a plain"),
}  # fmt: skip

CONFIGS: dict[str, Case] = {
    "a list": (bytes_of(b"[]"), "expected a JSON object"),
    "deep": (edit(lambda raw: raw[:-1] + b', "x": ' + DEEP), "nested more than 64 deep"),
    "NaN": (edit(lambda raw: raw[:-1] + b', "x": NaN}'), "NaN is not a JSON number"),
    "infinity": (edit(lambda raw: raw[:-1] + b', "x": 1e999}'), "x: not valid JSON"),
    "a key twice": (edit(lambda raw: raw[:-1] + b', "head_dim": 1}'), "'head_dim' occurs twice"),
    "a long number": (edit(lambda raw: raw[:-1] + b', "x": ' + b"9" * 5000 + b"}"), "not valid"),
    "of Python": (edit(lambda raw: raw.replace(b'"', b"'")), "not valid JSON"),
    "no architecture": (json_with(architectures=...), "architectures"),
    "architectures empty": (json_with(architectures=[]), "architectures"),
    "architectures a text": (json_with(architectures="LlamaForCausalLM"), "architectures"),
    "architecture unknown": (json_with(architectures=["../../x"]), "architecture '../../x'"),
    "two architectures": (json_with(architectures=["LlamaForCausalLM"] * 2), "architectures"),
    "hidden size negative": (json_with(hidden_size=-32), "hidden_size"),
    "hidden size 0": (json_with(hidden_size=0), "hidden_size"),
    "hidden size true": (json_with(hidden_size=True), "hidden_size"),
    "hidden size a fraction": (json_with(hidden_size=32.5), "hidden_size"),
    "hidden size a text": (json_with(hidden_size="32"), "hidden_size"),
    "layers 2^62": (json_with(num_hidden_layers=1 << 62), ""),
    "heads 0": (json_with(num_attention_heads=0), "num_attention_heads"),
    "epsilon a text": (json_with(rms_norm_eps="1e-5"), "rms_norm_eps"),
    "activation unknown": (json_with(hidden_act="os.system"), "hidden_act"),
    "quantization a list": (json_with(quantization_config=[1]), "quantization_config"),
    "quantized by nobody": (
        json_with(quantization_config={"quant_method": "\x1b[2J"}),
        "quantization_config.quant_method",
    ),
}  # fmt: skip


def model_with(**changes: object) -> Act:
    """Changes what a tokenizer.json says of its model; ... removes a field."""

    def act(path: Path) -> None:
        content = json.loads(path.read_text())
        content["model"] |= changes
        for field in [field for field, value in changes.items() if value is ...]:
            del content["model"][field]
        path.write_text(json.dumps(content))

    return act


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "BPE",
        "vocab": {letter: number for number, letter in enumerate("abcdefgh")} | {"ab": 8},
        "merges": [["a", "b"]],
    },
}
TOKENIZERS: dict[str, Case] = {
    "a list": (bytes_of(b"[]"), ""),
    "deep": (edit(lambda raw: raw[:-1] + b', "x": ' + DEEP), ""),
    "no model": (json_with(model=...), ""),
    "model null": (json_with(model=None), ""),
    "model of no type": (model_with(type="GPT-9"), ""),
    "vocabulary missing": (model_with(vocab=...), ""),
    "vocabulary a list": (model_with(vocab=["a"]), ""),
    "numbers of text": (model_with(vocab={"a": "0"}), ""),
    "negative numbers": (model_with(vocab={"a": -1}), ""),
    "merges of nobody": (model_with(merges=[["x", "y"]]), ""),
    "merges of three": (model_with(merges=[["a", "b", "c"]]), ""),
    "no normalizer": (json_with(normalizer={"type": "None of these"}), ""),
}
