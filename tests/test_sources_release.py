"""The release layout: which file is which tensor, how scales apply, what is refused."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from make_release import write_hollow_grok_1, write_random_release

from grokquant.errors import InputError
from grokquant.sources import open_source
from grokquant.sources.pickles import read_array, read_headers
from grokquant.sources.release import file_name, leaf_names
from grokquant.toy.release_writer import (
    quantize_leaf,
    write_leaf,
    write_release,
)

SLOTS = [  # in the order of the files of a layer, with the real Grok-1's shapes
    ("moe/linear", (8, 6144, 32768), (8, 1, 32768)),
    ("moe/linear_1", (8, 32768, 6144), (8, 8, 6144)),
    ("moe/linear_v", (8, 6144, 32768), (8, 1, 32768)),
    ("multi_head_attention/key", (6144, 1024), (1, 1024)),
    ("multi_head_attention/linear", (6144, 6144), (8, 6144)),
    ("multi_head_attention/query", (6144, 6144), (1, 6144)),
    ("multi_head_attention/value", (6144, 1024), (1, 1024)),
    ("rms_norm", (6144,), None),
    ("rms_norm_1", (6144,), None),
    ("rms_norm_2", (6144,), None),
    ("rms_norm_3", (6144,), None),
    ("router", (6144, 8), None),
]
SLOT = {name: i for i, (name, _, _) in enumerate(SLOTS)}
NORMS = ["pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"]
MATRICES = {  # HF name within a layer -> slot, expert tensors with {e}
    "self_attn.q_proj": "multi_head_attention/query",
    "self_attn.k_proj": "multi_head_attention/key",
    "self_attn.v_proj": "multi_head_attention/value",
    "self_attn.o_proj": "multi_head_attention/linear",
    "block_sparse_moe.experts.{e}.w1": "moe/linear",
    "block_sparse_moe.experts.{e}.w3": "moe/linear_v",
    "block_sparse_moe.experts.{e}.w2": "moe/linear_1",
}


def naive_index(layer: int, slot: int, layers: int) -> int:
    return 2 + 12 * sorted(range(layers), key=str).index(layer) + slot


def stored(directory: Path, layer: int, slot: str, layers: int) -> list[np.ndarray]:
    """The arrays of a file as float32, through none of the code under test but the walker."""
    path = directory / "ckpt-0" / f"tensor{naive_index(layer, SLOT[slot], layers):05d}_000"
    return [read_array(path, header).float().numpy() for header in read_headers(path)]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("release")
    write_random_release(directory, layers=12)
    return directory


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    write_random_release(directory, layers=2)
    return directory


@pytest.fixture
def copy(two_layers, tmp_path) -> Path:
    """Two layers that a test may damage."""
    return shutil.copytree(two_layers, tmp_path / "copy")


def change_config(directory: Path, **fields) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


# --- what lies where


def test_files_are_numbered_by_the_string_order_of_layers():
    names = leaf_names(64)
    first = {0: 2, 1: 14, 2: 146, 3: 278, 9: 758, 10: 26, 19: 134, 20: 158, 29: 266, 30: 290}
    first |= {39: 398, 40: 422, 59: 662, 6: 674, 60: 686, 63: 722, 7: 734, 8: 746}
    assert len(names) == 770
    assert names[:2] == ["language_model/in_out_embed", "language_model/rms_norm"]
    for layer, index in first.items():
        slots = [name.split("/", 2)[2] for name in names[index : index + 12]]
        assert slots == [name for name, _, _ in SLOTS]
        assert names[index].startswith(f"transformer/decoder_layer_{layer}/")
    assert file_name(names.index("transformer/decoder_layer_10/moe/linear")) == "tensor00026_000"


def test_layers_of_a_checkpoint_are_told_apart(copy):
    """Each layer's norm holds its number; a numeric order would swap them from layer 2 on."""
    shutil.rmtree(copy)
    config = write_random_release(copy, layers=12)
    for layer in range(12):
        index = naive_index(layer, SLOT["rms_norm"], 12)
        write_leaf(copy / "ckpt-0" / file_name(index), torch.full((64,), float(layer)))
    source = open_source(copy)
    assert source.config["num_hidden_layers"] == config["num_hidden_layers"] == 12
    for layer in range(12):
        norm = source.tensors[f"model.layers.{layer}.pre_attn_norm.weight"].read()
        assert norm.tolist() == [layer] * 64


def bytes_read() -> int:
    """What this process has read from files so far."""
    first = Path("/proc/self/io").read_text().splitlines()[0]
    return int(first.removeprefix("rchar: "))


def test_published_total_size_and_shapes_open_without_config(tmp_path):
    """All 770 files in full size, with holes in place of the weights."""
    total = write_hollow_grok_1(tmp_path)
    assert total == 318_239_886_140
    before = bytes_read()
    source = open_source(tmp_path)
    assert bytes_read() - before < 770 * 65_536  # headers
    assert source.licence == "apache-2.0"
    assert source.config["num_hidden_layers"] == 64
    assert source.config["head_dim"] == 128 and source.config["num_key_value_heads"] == 8
    assert source.config["attn_output_multiplier"] == 0.08838834764831845
    parameters = sum(torch.Size(ref.shape).numel() for ref in source.tensors.values())
    assert parameters == 315_684_820_992
    down = source.tensors["model.layers.63.block_sparse_moe.experts.7.w2.weight"]
    assert down.shape == (6144, 32768) and down.scheme and down.scheme.group_size == 4096


@pytest.mark.parametrize("layer", [0, 2, 10, 11])
@pytest.mark.parametrize("name", MATRICES)
def test_matrices_equal_the_literal_formula(release, layer, name):
    """W[k, n] = bf16(int8[k, n]) * scales[k // (K / G), n], transposed."""
    weight, scales = stored(release, layer, MATRICES[name], layers=12)
    experts = range(4) if "{e}" in name else [None]
    for expert in experts:
        ref = open_source(release).tensors[f"model.layers.{layer}.{name.format(e=expert)}.weight"]
        w, s = (weight, scales) if expert is None else (weight[expert], scales[expert])
        rows, groups = len(w), len(s)
        expected = np.stack([w[k] * s[k // (rows // groups)] for k in range(rows)])
        read = ref.read()
        assert read.dtype == ref.dtype == torch.bfloat16
        assert torch.equal(read, torch.from_numpy(expected).bfloat16().T), ref.name

        quantized = ref.read_quantized()
        assert quantized.scheme == ref.scheme
        assert quantized.scheme.group_size == (None if groups == 1 else rows // groups)
        assert quantized.codes.dtype == torch.int8
        assert quantized.scales.shape == (ref.shape[0], groups)
        assert np.array_equal(quantized.codes.numpy(), w.T)
        assert ref.stored_bytes == w.size + 2 * s.size


def test_grouped_scales_are_not_per_channel(release):
    weight, scales = stored(release, 0, "multi_head_attention/linear", layers=12)
    assert scales.shape[0] == 8 and np.ptp(scales, axis=0).max() > 0
    read = open_source(release).tensors["model.layers.0.self_attn.o_proj.weight"].read()
    per_channel = torch.from_numpy(weight * scales[:1]).bfloat16().T
    assert not torch.equal(read, per_channel)
    assert torch.equal(read[:, :8], per_channel[:, :8])


def test_float_leaves(release):
    tensors = open_source(release).tensors
    assert tensors["model.norm.weight"].read().dtype == torch.float32
    for number, norm in enumerate(NORMS):
        slot = f"rms_norm_{number}" if number else "rms_norm"
        expected = stored(release, 3, slot, layers=12)[0]
        assert np.array_equal(tensors[f"model.layers.3.{norm}.weight"].read().numpy(), expected)
    router = tensors["model.layers.3.block_sparse_moe.gate.weight"].read()
    assert router.dtype == torch.float32 and router.is_contiguous()
    assert np.array_equal(router.numpy(), stored(release, 3, "router", layers=12)[0].T)
    path = release / "ckpt-0" / "tensor00000_000"
    embedding = read_array(path, read_headers(path)[0])
    read = tensors["model.embed_tokens.weight"].read()
    assert read.dtype == torch.float32 and torch.equal(read, embedding)


def test_every_reference_tells_the_truth(release):
    source = open_source(release)
    assert len(source.tensors) == 2 + 12 * (4 + 3 * 4 + 4 + 1)
    assert len(source.weight_files) == 2 + 12 * 12
    for name, ref in source.tensors.items():
        tensor = ref.read()
        assert (name, ref.shape, ref.dtype) == (ref.name, tensor.shape, tensor.dtype)
    overhead = sum(path.stat().st_size for path in source.weight_files)
    overhead -= sum(ref.stored_bytes for ref in source.tensors.values())
    assert 0 < overhead < 400 * len(source.weight_files)


def test_config_has_all_fields(release):
    assert open_source(release).config == {
        "model_type": "grok-1",
        "architectures": ["Grok1ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 12,
        "vocab_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attn_output_multiplier": pytest.approx(32**-0.5),
        "embedding_multiplier_scale": 8.0,
        "output_multiplier_scale": pytest.approx(3**-0.5),
        "attn_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }


def test_config_spellings(copy, tmp_path):
    plain = open_source(copy).config
    change_config(copy, num_local_experts=..., num_experts=4, max_attn_value=20, head_dim=...)
    change_config(copy, hidden_size=..., auto_map={"AutoConfig": "evil.py"}, bos_token_id=None)
    changes = {"attn_logit_softcapping": 20.0, "bos_token_id": None}
    assert open_source(copy).config == plain | changes
    shutil.move(copy / "config.json", tmp_path / "elsewhere.json")
    assert open_source(copy, tmp_path / "elsewhere.json").config == plain | changes


def test_opened_from_ckpt_0_itself(copy, monkeypatch):
    (copy / "tokenizer.model").write_bytes(b"x")
    (copy / "ckpt-0" / "tokenizer_config.json").write_bytes(b"{}")
    monkeypatch.chdir(copy / "ckpt-0")
    for path in (copy, copy / "ckpt-0", Path(".")):
        source = open_source(path)
        assert source.kind == "release" and source.licence is None
        names = [file.name for file in source.tokenizer_files]
        assert names == ["tokenizer.model", "tokenizer_config.json"]
    shutil.move(copy / "ckpt-0", copy.parent / "weights")
    shutil.move(copy / "config.json", copy.parent / "weights")
    assert open_source(copy.parent / "weights").config["num_hidden_layers"] == 2


def test_nothing_is_read_on_open(copy, monkeypatch):
    def refuse(*_):
        raise AssertionError("payload mapped")

    monkeypatch.setattr("grokquant.sources.release.read_array", refuse)
    open_source(copy)


# --- the writer


def test_quantize_leaf_against_loops():
    torch.manual_seed(0)
    weight = torch.randn(2, 12, 5)
    weight[1, :4, 2] = 0
    codes, scales = quantize_leaf(weight, groups=3)
    assert scales.shape == (2, 3, 5) and scales.dtype == torch.bfloat16
    for e, k, n in np.ndindex(2, 12, 5):
        column = weight[e, k // 4 * 4 : k // 4 * 4 + 4, n]
        scale = torch.tensor(float(column.abs().max()) / 127 or 1.0).bfloat16().float()
        assert float(scales[e, k // 4, n]) == float(scale)
        code = torch.round(weight[e, k, n] / scale).clamp(-127, 127)
        assert int(codes[e, k, n]) == int(code)


def test_writer_wants_every_leaf_once(tmp_path):
    leaves = [(name, torch.ones(2)) for name in leaf_names(1)]
    with pytest.raises(ValueError, match="1 leaves are missing"):
        write_release(tmp_path, {"num_hidden_layers": 1}, leaves[:-1])
    assert not (tmp_path / "config.json").exists()
    for broken in (leaves + leaves[:1], [("other", torch.ones(2))]):
        with pytest.raises(ValueError, match="unknown or repeated"):
            write_release(tmp_path, {"num_hidden_layers": 1}, broken)


def test_writer_leaves_no_temporary_file(tmp_path):
    write_leaf(tmp_path / "leaf", torch.ones(3))
    with pytest.raises(KeyError):
        write_leaf(tmp_path / "leaf", torch.ones(3, dtype=torch.complex64))
    assert os.listdir(tmp_path) == ["leaf"]
    assert len(read_headers(tmp_path / "leaf")) == 1


# --- what is refused


def refusal(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        source = open_source(directory)
        for ref in source.tensors.values():
            ref.read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shard(directory: Path, index: int) -> Path:
    return directory / "ckpt-0" / f"tensor{index:05d}_000"


def test_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    (tmp_path / "hollow" / "ckpt-0").mkdir(parents=True)
    complaints = {
        "absent": "no such directory",
        "other/notes.txt": "expected the directory",
        "empty": "is empty",
        "other": "looked for ckpt-0/tensor00000_000; model.safetensors",
        "hollow": "no release files",
    }
    for name, complaint in complaints.items():
        message = refusal(tmp_path / name)
        assert message.startswith(str(tmp_path / name)) and complaint in message


@pytest.mark.parametrize("index", [0, 1, 7, 25])
@pytest.mark.parametrize("with_config", [True, False])
def test_missing_file(copy, index, with_config):
    change_config(copy, num_hidden_layers=2 if with_config else ...)
    shard(copy, index).unlink()
    assert f"tensor{index:05d}_000: missing" in refusal(copy)


def test_a_whole_layer_missing(copy):
    for index in range(14, 26):
        shard(copy, index).unlink()
    message = refusal(copy)
    assert "tensor00014_000, tensor00015_000, tensor00016_000 and 9 more: missing" in message


@pytest.mark.parametrize("name", ["tensor00026_000", "tensor00003_001"])
def test_extra_file(copy, name):
    shutil.copy(shard(copy, 3), copy / "ckpt-0" / name)
    assert f"{name}: unexpected" in refusal(copy)


def test_other_files_do_not_matter(copy):
    for name in ("tensor00001_000.tmp", "README.md", "tensors.txt"):
        (copy / "ckpt-0" / name).write_text("x")
    open_source(copy)


@pytest.mark.parametrize("index", [0, 2, 3, 5, 9, 13])
def test_truncated_file(copy, index):
    os.truncate(shard(copy, index), shard(copy, index).stat().st_size - 1)
    assert shard(copy, index).name in refusal(copy)


def test_file_shrinks_after_opening(copy):
    source = open_source(copy)
    os.truncate(shard(copy, 2), 300)
    with pytest.raises(InputError, match="tensor00002_000: cannot be read"):
        source.tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"].read()
    shard(copy, 2).unlink()
    with pytest.raises(InputError, match="tensor00002_000: cannot be read"):
        source.tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"].read()


@pytest.mark.parametrize(
    ("first", "second"),
    [(0, 1), (0, 2), (2, 3), (3, 4), (5, 6), (6, 9), (12, 13), (1, 13), (5, 15)],
)
def test_swapped_files(copy, first, second):
    a, b = shard(copy, first), shard(copy, second)
    a.rename(a.with_suffix(".x"))
    b.rename(a)
    a.with_suffix(".x").rename(b)
    assert re.search(r"tensor\d{5}_000: \w+/\S+ (has|must)", refusal(copy))


WRONG_LEAVES = {
    "shape": (8, (torch.ones(64, 64).char(), torch.ones(2, 64).bfloat16()), "shape (64, 64)"),
    "rank": (3, torch.ones(4, 4), "must hold an int8 weight"),
    "experts": (
        3,
        (torch.ones(3, 128, 64).char(), torch.ones(3, 8, 64).bfloat16()),
        "has shape (3, 128, 64), expected (4, 128, 64)",
    ),
    "groups": (6, (torch.ones(64, 64).char(), torch.ones(5, 64).bfloat16()), "scales (5, 64)"),
    "scale columns": (6, (torch.ones(64, 64).char(), torch.ones(8, 32).bfloat16()), "scales"),
    "scale rank": (6, (torch.ones(64, 64).char(), torch.ones(64).bfloat16()), "scales (64,)"),
    "scale dtype": (6, (torch.ones(64, 64).char(), torch.ones(8, 64)), "bfloat16 scales"),
    "weight dtype": (6, (torch.ones(64, 64), torch.ones(8, 64).bfloat16()), "int8 weight"),
    "plain matrix": (6, torch.ones(64, 64), "must hold an int8 weight and bfloat16 scales"),
    "int8 norm": (9, torch.ones(64).char(), "must hold one float32 array"),
    "quantized norm": (9, (torch.ones(64).char(), torch.ones(64).bfloat16()), "one float32"),
    "norm": (10, torch.ones(63), "has shape (63,), expected (64,)"),
    "router": (13, torch.ones(64, 5), "has shape (64, 5), expected (64, 4)"),
    "embedding": (0, torch.ones(5), "has shape (5,), expected ('V', 'D')"),
}


@pytest.mark.parametrize("kind", WRONG_LEAVES)
def test_wrong_leaf(copy, kind):
    index, leaf, complaint = WRONG_LEAVES[kind]
    write_leaf(shard(copy, index), leaf)
    message = refusal(copy)
    assert message.startswith(str(shard(copy, index))) and complaint in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", range(14))
def test_nan_and_infinity(copy, index, value):
    """Where floats are: the embedding, norms and routers, and all scales."""
    headers = read_headers(shard(copy, index))
    arrays = [read_array(shard(copy, index), header).clone() for header in headers]
    floats = arrays[-1]
    place = tuple(size - 1 for size in floats.shape)
    floats[place] = value
    write_leaf(shard(copy, index), arrays[0] if len(arrays) == 1 else (arrays[0], arrays[1]))
    open_source(copy)
    message = refusal(copy)
    place = place[1:] if len(place) == 3 else place
    assert message.startswith(str(shard(copy, index)))
    assert message.endswith(f": 1 values are NaN or infinite, first at {place}")
    assert leaf_names(2)[index] in message
    assert ("of expert 3" in message) == (floats.dim() == 3)


def test_nonfinite_count_over_chunks(copy, monkeypatch):
    monkeypatch.setattr("grokquant.sources.release.CHUNK_ROWS", 10)
    embedding = torch.ones(128, 64)
    embedding[[37, 38, 120]] = float("nan")
    write_leaf(shard(copy, 0), embedding)
    assert refusal(copy).endswith("192 values are NaN or infinite, first at (37, 0)")


WRONG_CONFIGS = {
    "hidden_size": (dict(hidden_size=65), "hidden_size is 65, but the files have 64"),
    "layers": (dict(num_hidden_layers=3), "tensor00026_000"),
    "vocab": (dict(vocab_size=1000), "vocab_size is 1000, but the files have 128"),
    "experts": (dict(num_local_experts=8), "num_local_experts is 8, but the files have 4"),
    "alias": (dict(num_experts=8), "num_experts"),
    "ffn": (dict(intermediate_size=1), "intermediate_size is 1, but the files have 128"),
    "heads": (dict(num_attention_heads=4), "num_attention_heads 4 times head_dim 32 is 128"),
    "kv heads": (dict(num_key_value_heads=2), "num_key_value_heads 2 times head_dim 32 is 64"),
    "head_dim": (dict(head_dim=16), "times head_dim 16 is 32"),
    "many heads": (dict(num_attention_heads=100, head_dim=...), "num_attention_heads 100"),
    "missing": (
        dict(num_attention_heads=..., output_multiplier_scale=...),
        "must also give num_attention_heads, output_multiplier_scale",
    ),
    "text": (dict(hidden_size="64"), 'hidden_size must be a positive whole number, not "64"'),
    "float": (dict(hidden_size=64.0), "hidden_size must be a positive whole number"),
    "flag": (dict(num_attention_heads=True), "num_attention_heads must be a positive whole"),
    "zero": (dict(num_key_value_heads=0), "num_key_value_heads must be a positive whole number"),
    "negative": (dict(rms_norm_eps=-1e-5), "rms_norm_eps must be a positive number"),
    "nan": (
        dict(attn_output_multiplier=float("nan")),
        "config.json: not valid JSON: NaN is not a JSON number",
    ),
    "list": (dict(rope_theta=[1]), "rope_theta must be a positive number, not [1]"),
    "null": (dict(rope_theta=None), "rope_theta must be a positive number, not null"),
    "huge": (dict(rope_theta=10**400), "rope_theta must be a positive number"),
    "untied": (dict(tie_word_embeddings=False), "tie_word_embeddings must be true"),
    "top k": (dict(num_experts_per_tok=5), "num_experts_per_tok is larger than"),
    "token": (dict(pad_token_id=-1), "pad_token_id must be a token id"),
    "tokens": (dict(eos_token_id=[1, 2]), "eos_token_id must be a token id"),
    "many layers": (dict(num_hidden_layers=10**7), "too few for 10000000 layers"),
}


@pytest.mark.parametrize("kind", WRONG_CONFIGS)
def test_wrong_config(copy, kind):
    fields, complaint = WRONG_CONFIGS[kind]
    change_config(copy, **fields)
    assert complaint in refusal(copy)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe",
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"a": 1' + b"0" * 9999,
    ],
)
def test_config_is_not_json(copy, raw):
    (copy / "config.json").write_bytes(raw)
    assert refusal(copy).startswith(str(copy / "config.json"))


def test_config_is_missing(copy):
    (copy / "config.json").unlink()
    message = refusal(copy)
    for field in ("num_attention_heads", "num_key_value_heads", "embedding_multiplier_scale"):
        assert field in message
    assert "hidden_size" not in message and "head_dim" not in message
    with pytest.raises(InputError, match="absent.json: cannot be read"):
        open_source(copy, copy / "absent.json")


def test_refs_are_frozen(release):
    ref = next(iter(open_source(release).tensors.values()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        ref.name = "other"
