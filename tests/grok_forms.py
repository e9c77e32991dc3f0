"""Writes a Grok-1 that was opened from its release in the forms that others publish it in.

The names are spelled out here once more, as the model cards and loaders of each have them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from grokquant.checkpoint import Checkpoint

Tensors = dict[str, Tensor]
NUMBERS = ("attn_output_multiplier", "embedding_multiplier_scale", "output_multiplier_scale")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
HEADS = ("num_attention_heads", "num_key_value_heads", "num_experts_per_tok")
HPCAI = {
    r"model.norm.weight": "model.norm.scale",
    r"(pre_attn|post_attn|pre_moe|post_moe)_norm.weight": r"\1_norm.scale",
    r"self_attn": "attn",
    r"block_sparse_moe.gate": "moe_block.gate",
    r"block_sparse_moe.experts.(\d+).w1": r"moe_block.experts.\1.linear",
    r"block_sparse_moe.experts.(\d+).w3": r"moe_block.experts.\1.linear_v",
    r"block_sparse_moe.experts.(\d+).w2": r"moe_block.experts.\1.linear_1",
}
KEYFAN = {
    r"model.embed_tokens": "transformer.in_out_embed",
    r"model.norm": "transformer.rms_norm",
    r"model.layers": "transformer.decoder_layer",
    r"self_attn.q_proj": "multi_head_attention.query",
    r"self_attn.k_proj": "multi_head_attention.key",
    r"self_attn.v_proj": "multi_head_attention.value",
    r"self_attn.o_proj": "multi_head_attention.linear",
    r"block_sparse_moe.gate": "router",
    r"block_sparse_moe.experts.(\d+).w1": r"moe.\1.linear",
    r"block_sparse_moe.experts.(\d+).w3": r"moe.\1.linear_v",
    r"block_sparse_moe.experts.(\d+).w2": r"moe.\1.linear_1",
    r"pre_attn_norm": "rms_norm",
    r"post_attn_norm": "rms_norm_1",
    r"pre_moe_norm": "rms_norm_2",
    r"post_moe_norm": "rms_norm_3",
}


def dense(checkpoint: Checkpoint) -> Tensors:
    return {name: ref.read().contiguous() for name, ref in checkpoint.source.tensors.items()}


def renamed(tensors: Tensors, table: dict[str, str]) -> Tensors:
    def name_of(name: str) -> str:
        for pattern, name_there in table.items():
            name = re.sub(pattern.replace(".", r"\.").replace(r"\d+", "[0-9]+"), name_there, name)
        return name

    return {name_of(name): value for name, value in tensors.items()}


def write(path: Path, tensors: Tensors, config: dict) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_hpcai(path: Path, release: Checkpoint) -> Path:
    """hpcai-tech/grok-1: norms are called scale, and the head is stored once more."""
    own = release.source.config
    config = {key: own[key] for key in (*SIZES[:4], *HEADS, *NUMBERS)}
    config |= {"architectures": ["Grok1ModelForCausalLM"], "model_type": "grok-1"}
    config |= {
        "num_experts": own["num_local_experts"],
        "max_attn_value": 30.0,
        "rms_norm_eps": 1e-5,
    }
    config |= {"auto_map": {"AutoConfig": "configuration_grok1.Grok1Config"}}
    config |= {"max_position_embeddings": own["max_position_embeddings"]}
    config |= {"tie_word_embeddings": True, "output_router_logits": False}
    tensors = renamed(dense(release), HPCAI)
    head = tensors["model.embed_tokens.weight"].clone()
    return write(path, tensors | {"lm_head.weight": head}, config)


def write_keyfan(path: Path, release: Checkpoint) -> Path:
    """keyfan/grok-1-hf, with the defaults of its class that contradict the model written out."""
    own = release.source.config
    config = {key: own[key] for key in (*SIZES, *HEADS, *NUMBERS, "num_local_experts")}
    config |= {"architectures": ["GrokForCausalLM"], "model_type": "grok", "hidden_act": "silu"}
    config |= {"rope_theta": 100000.0, "max_position_embeddings": 4096}
    tensors = renamed(dense(release), KEYFAN)
    head = tensors["transformer.in_out_embed.weight"].clone()
    config |= {"tie_word_embeddings": False}
    return write(path, tensors | {"lm_head.weight": head}, config)


def write_sglang(path: Path, release: Checkpoint) -> Path:
    """Our own names in one file."""
    config = {
        "architectures": ["Grok1ForCausalLM"],
        "model_type": "grok-1",
        "torch_dtype": "bfloat16",
    }
    return write(path, dense(release), release.source.config | config)


def write_presharded(path: Path, release: Checkpoint, ranks: int = 2) -> Path:
    """lmzheng/grok-1: a file per rank, one with what they share, two groups of layers."""
    path.mkdir()
    files: dict[str, Tensors] = {}
    for name, value in dense(release).items():
        group = "00001" if "layers.1." in name else "00000"
        shared = value.ndim == 1 or ".gate." in name or "embed" in name
        axis = 1 if re.search(r"w2|o_proj", name) else 0
        for rank, part in enumerate(value.chunk(ranks, axis)):
            file = f"pytorch_model-{group}-TP-{'common' if shared else f'{rank:03d}'}.safetensors"
            files.setdefault(file, {})[name] = value if shared else part.contiguous()
    for file, tensors in files.items():
        save_file(tensors, path / file)
    # An index names one file for each tensor, whichever came last.
    index = {name: file for file, tensors in files.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "config.json").write_text(json.dumps(release.source.config))
    return path


FORMS: dict[str, Callable[[Path, Checkpoint], Path]] = {
    "hpcai": write_hpcai,
    "keyfan": write_keyfan,
    "sglang": write_sglang,
    "presharded": write_presharded,
}


def swap(path: Path, one: str, other: str) -> None:
    """Exchanges two names in the only file of a directory."""
    tensors = load_file(path / "model.safetensors")
    exchanged = {one: other, other: one}
    assert exchanged.keys() <= tensors.keys()
    save_file({exchanged.get(n, n): t for n, t in tensors.items()}, path / "model.safetensors")
