"""Tries the families that are derived from transformers, on random models of their architectures.

    python eval/try_families.py [--json FILE] [ARCHITECTURE ...]

For each architecture of a causal language model, and some for images and text, a tiny model with
random weights is saved by transformers, and then

    loaded       `load` computes transformers' logits
    streamed     so does the model that evaluation and calibration run, layer by layer if it can
    rtn, gptq    its output in int4 passes `verify`, loads packed, is streamed, and loads in
                 transformers without grokquant where that is possible
    default      so does that of the default recipe, by two-sided rounding where that is possible
    planned      the bits per weight of the default recipe

Prints a line for each, and puts what was found into FILE, where results of others stay.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.quantizers import auto

from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.job import pipeline
from grokquant.job.default_recipe import values_for
from grokquant.job.plan import build_plan
from grokquant.job.verify import verify
from grokquant.methods import METHODS
from grokquant.recipe import parse_recipe
from grokquant.runtime.load import load
from grokquant.streaming.blocks import Rows
from grokquant.streaming.stream import Stream
from grokquant.streaming.whole import running
from grokquant.toy import TOY_PATH

# What config fields of each meaning are in a tiny model.
SIZES = {
    2048: "vocab_size",
    64: "hidden_size n_embd d_model dim embed_dim n_embed embedding_size "
    "shared_expert_intermediate_size shared_intermediate_size",
    96: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size block_ff_dim intermediate_size_mlp "
    "dense_intermediate_size mlp_intermediate_size encoder_ffn_dim decoder_ffn_dim",
    32: "moe_intermediate_size expert_ffn_hidden_size expert_intermediate_size kv_lora_rank "
    "q_lora_rank qk_head_dim index_head_dim mamba_d_head moe_shared_expert_intermediate_size "
    "hidden_size_per_layer_input",
    3: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers",
    4: "num_attention_heads n_head n_heads num_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts index_n_heads linear_num_value_heads mamba_n_heads "
    "mamba_num_heads encoder_attention_heads decoder_attention_heads",
    2: "num_key_value_heads num_experts_per_tok moe_topk num_experts_per_token moe_k "
    "top_k_experts linear_num_key_heads mamba_expand eos_token_id",
    16: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim sliding_window linear_key_head_dim "
    "linear_value_head_dim mamba_d_state mamba_head_dim ssm_state_size state_size",
    1: "n_group topk_group n_shared_experts num_shared_experts bos_token_id first_k_dense_replace "
    "mamba_n_groups",
    128: "max_position_embeddings n_positions max_seq_len mamba_d_ssm",
    0: "pad_token_id",
    # Tokens that an index keeps: more than there are, so that it keeps the same ones in bf16.
    256: "index_topk",
}
# Fields of single architectures that must fit to others.
_HYBRID = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}


def _three_axes(*sections: int) -> dict[str, Any]:
    """Positions of time, height and width: `sections` add up to half the features that turn."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    return {"rope_parameters": rope}


_FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 3, **_FEW_EXPERTS},
    "bamba": {"attn_layer_indices": [2], "mamba_d_head": 32},
    "codegen": {"rotary_dim": 8},
    "cosmos3_edge_text": _three_axes(2, 3, 3),
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}}
    | {"ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}},
    "gemma4_text": {"enable_moe_block": True, "num_kv_shared_layers": 0}
    | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    | {"vocab_size_per_layer_input": 2048, "global_head_dim": 32},
    "gemma3n_text": {"num_kv_shared_layers": 1, "vocab_size_per_layer_input": 2048}
    | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32]},
    "gpt_neo": {"attention_types": [[["global"], 3]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _HYBRID,
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 2},
    "kimi_linear": _HYBRID | _FEW_EXPERTS,
    "kolibri1": _FEW_EXPERTS,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 32, "expand": 2, "n_groups": 1},
    "mellum": _FEW_EXPERTS,
    "nemotron_h": {"n_groups": 1, "mamba_head_dim": 32}
    | {"layers_block_type": ["linear_attention", "moe", "full_attention"]},
    "olmo_hybrid": _HYBRID,
    "glm4v_text": _three_axes(2, 3, 3),
    "glm4v_moe_text": _three_axes(1, 1, 2),
    "qwen2_vl_text": _three_axes(2, 3, 3),
    "qwen2_5_vl_text": _three_axes(2, 3, 3),
    "qwen3_moe": _FEW_EXPERTS,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp_text": _HYBRID
    | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
    | {"indexer_budget": 256, "indexer_compress_ratio": 4},
    "rwkv": {"rescale_every": 0},  # else its code changes the weights while it runs
    "xlstm": {"qk_dim_factor": 1.0},  # a multiple of 64, as transformers rounds it
    "jetmoe": {"kv_channels": 32},  # experts of the attention are [2 * 32, 64]
    "youtu": {"pad_token_id": None},  # its class empties the row of padding when it loads a file
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid", "hybrid"], "hybrid_layer_ids": [1, 2]},
    "zaya": {"num_experts_per_tok": 1},
}
# Models for images and text, with fields beside the configs of their parts.
IMAGE_TEXT: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "gemma3": {"mm_tokens_per_image": 4},
}
_DECODER = "its config is not that of its decoder, for which transformers has no model_type"
_PACKAGES = "its image part needs the packages timm and pillow"
# Kinds of which no model can be made here.
UNTRIED = {
    "evolla": "AutoModelForImageTextToText of transformers makes no model of its config",
    "fast_vlm": _PACKAGES,
    "gemma3n": _PACKAGES,
    "musicgen": _DECODER,
    "musicgen_melody": _DECODER,
    "perception_lm": _PACKAGES,
    "shieldgemma2": "transformers does not read back what it saves of it",
}
MOST_PARAMETERS = 60_000_000  # of a tiny model
VISION_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "embed_dim": 32,
    "out_hidden_size": 64,
    "projection_dim": 32,
    "text_hidden_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "output_dim": 64,
}
TOKENS = torch.randint(3, 2048, (3, 48), generator=torch.Generator().manual_seed(1))
CLOSE = 1e-5
# Of logits in bfloat16: transformers may add up in another order.
ALONE_CLOSE = 0.01
# Of logits in float32 of a packed model: its products keep more digits than dequantized weights.
PACKED_CLOSE = 0.05


def auto_class(kind: str) -> Any:
    """The class of transformers that makes models of this `model_type`."""
    text = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in IMAGE_TEXT
    return AutoModelForCausalLM if text else AutoModelForImageTextToText


def tiny_config(kind: str) -> Any:
    """The config of a tiny model of this `model_type`."""
    config_class = CONFIG_MAPPING[kind]
    fields = set(config_class.__dataclass_fields__)
    if "text_config" in config_class.sub_configs:
        return config_class(**tiny_parts(config_class) | IMAGE_TEXT.get(kind, {}))
    sizes: dict[str, Any] = {
        name: size for size, names in SIZES.items() for name in names.split() if name in fields
    }
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        sizes["num_key_value_heads"] = 4  # one for each head of queries
    if "is_decoder" in fields:
        sizes["is_decoder"] = True
    own = OWN.get(kind, {}) | IMAGE_TEXT.get(kind, {})
    return config_class(**tiny_parts(config_class) | sizes | own)


def tiny_parts(config_class: Any) -> dict[str, Any]:
    """The configs inside that of a model for images and text, as fields."""
    whole = config_class()
    parts: dict[str, Any] = {}
    for name in config_class.sub_configs:
        part = getattr(whole, name, None)
        if name == "text_config":
            parts[name] = tiny_config(part.model_type).to_dict()
        elif part is not None:
            fields = type(part).__dataclass_fields__
            sizes = {
                key: [size] * len(default) if isinstance(default, list | tuple) else size
                for key, size in VISION_SIZES.items()
                for default in ([getattr(part, key)] if key in fields else [])
            }
            parts[name] = sizes | {"model_type": part.model_type}
    return parts


def save_tiny_model(kind: str, directory: Path) -> PreTrainedModel:
    """A random model, saved in `directory` with a tokenizer beside it."""
    torch.manual_seed(0)
    model = auto_class(kind).from_config(tiny_config(kind), dtype=torch.float32).eval()
    for parameter in model.parameters():  # norms and biases of their own, too
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    shutil.copyfile(TOY_PATH / "tokenizer.model", directory / "tokenizer.model")
    return model


def eager(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its own code for experts, where transformers has several."""
    with suppress(ValueError, AttributeError):
        model.set_experts_implementation("eager")
    return model


def why_untried(kind: str) -> str | None:
    """Why no tiny model can be made of this `model_type`; None if one can."""
    if kind in UNTRIED:
        return UNTRIED[kind]
    size = attempt(lambda: size_of(kind))
    if isinstance(size, str):
        return f"no tiny config was found: {size}"
    if size > MOST_PARAMETERS:
        return f"no tiny config was found: the one tried has {size / 1e6:,.0f} million parameters"
    return None


def size_of(kind: str) -> int:
    """Parameters of the tiny model, which takes no memory for that."""
    with torch.device("meta"):
        model = auto_class(kind).from_config(tiny_config(kind))
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def without_us() -> Iterator[None]:
    """transformers as it is where grokquant is not imported."""
    configs = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    ours = configs["compressed-tensors"]
    configs["compressed-tensors"] = ours.__base__
    try:
        yield
    finally:
        configs["compressed-tensors"] = ours


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@torch.no_grad()
def streamed_logits(directory: Path) -> Tensor:
    model = running(open_checkpoint(directory))
    stream = Stream(model, [Rows(TOKENS)])
    for index in range(len(model.layers)):
        stream.run_layer(index)
    return model.logits(stream.hidden[0])


def rules_of(checkpoint: Checkpoint, method: str) -> list[dict[str, Any]]:
    """Rules for int4 in groups of 32: all matrices that have whole groups."""
    rules: dict[str, dict[str, Any] | None] = {}
    for matrix in checkpoint.matrices():
        match = f"layers.*.{matrix.kind.replace('experts.', 'experts.*.')}"
        is_seen = checkpoint.family.sees_inputs(matrix)
        own = method if is_seen or not METHODS[method].needs_site else "rtn"
        if checkpoint.source.tensors[matrix.tensor].shape[1] % 32:
            rules[match] = None
        rules.setdefault(match, {"match": match, "method": own, "bits": 4, "group": 32})
    return [rule for rule in rules.values() if rule]


@torch.no_grad()
def quantized(
    directory: Path, method: str, text: Path, model_class: Any = AutoModelForCausalLM
) -> dict[str, float | str]:
    """Quantizes with `method` and checks what comes out."""
    output = directory.with_name(f"{directory.name}-{method}")
    checkpoint = open_checkpoint(directory)
    content = {
        "model": {"path": str(directory)},
        "calibration": {"text": str(text), "samples": 8, "length": 64},
        "quantize": rules_of(checkpoint, method),
        "max_fallbacks": 1,
        "output": {"path": str(output)},
    }
    if method == "rtn":
        content.pop("calibration")
    found: dict[str, float | str] = {**output_of(content)}
    if not (checkpoint.family.names_experts or checkpoint.family.joins):
        found["alone"] = attempt(lambda: alone(output, model_class))
    shutil.rmtree(output)
    return found


@torch.no_grad()
def quantized_by_default(directory: Path, text: Path) -> dict[str, Any]:
    """Quantizes with the default recipe, but on few rows of text, and checks what comes out."""
    output = directory.with_name(f"{directory.name}-default")
    content = values_for(directory, output=output) | {"max_fallbacks": 1}
    if "calibration" in content:
        content["calibration"] = {"text": str(text), "samples": 8, "length": 64}
    methods = sorted({rule["method"] for rule in content["quantize"]})
    found = {"methods": methods, **output_of(content)}
    shutil.rmtree(output)
    return found


def output_of(content: dict[str, Any]) -> dict[str, float]:
    """Makes the output of a recipe, and says how far its logits are from its dense weights'."""
    output = Path(content["output"]["path"])
    pipeline.quantize(parse_recipe(content))
    verify(output)
    dense = load(output, dtype=torch.float32, packed=False)[0](TOKENS).logits
    packed = load(output, dtype=torch.float32)[0](TOKENS).logits
    return {
        "packed": relative(packed, dense),
        "streamed": relative(streamed_logits(output), dense),
    }


def alone(output: Path, model_class: Any) -> float:
    """How far the logits of transformers without grokquant are from ours, in bfloat16."""
    wanted = load(output, packed=False)[0](TOKENS).logits
    with without_us():
        model = model_class.from_pretrained(output, dtype=torch.bfloat16)
    return relative(eager(model)(TOKENS).logits, wanted)


def attempt(check: Callable[[], Any]) -> Any:
    """What a check finds, or the error that it meets."""
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


@torch.no_grad()
def try_family(kind: str, directory: Path) -> dict[str, Any]:
    """What holds for the architecture of this `model_type`; `directory` takes files."""
    if why := why_untried(kind):
        return {"untried": why}
    place = directory / kind
    text = directory / "text.txt"
    text.write_text(" ".join(f"word{i * 7919 % 1000} and then {i * 31 % 97}." for i in range(2000)))
    save_tiny_model(kind, place)
    model_class = auto_class(kind)
    original = model_class.from_pretrained(place, dtype=torch.float32)
    wanted = eager(original)(TOKENS).logits
    checkpoint = open_checkpoint(place)
    found = {
        "architecture": type(original).__name__,
        "family": checkpoint.family.name,
        "derived": type(checkpoint.family).__name__ == "DerivedFamily",
        "experts": checkpoint.num_experts,
        "images": kind in IMAGE_TEXT,
        "runs": "by layers" if checkpoint.family.streams else "whole",
        "one_by_one": checkpoint.family.runs_experts,
        "matrices": sorted({matrix.kind for matrix in checkpoint.matrices()}),
        "loaded": attempt(
            lambda: relative(load(place, dtype=torch.float32)[0](TOKENS).logits, wanted)
        ),
        "streamed": attempt(lambda: relative(streamed_logits(place), wanted)),
        "rtn": attempt(lambda: quantized(place, "rtn", text, model_class)),
        "gptq": attempt(lambda: quantized(place, "gptq", text, model_class)),
        "default": attempt(lambda: quantized_by_default(place, text)),
        "planned": attempt(lambda: planned(place)),
    }
    shutil.rmtree(place)
    return found


def planned(directory: Path) -> float:
    """Bits per weight of the default recipe's result."""
    return build_plan(parse_recipe(values_for(directory))).bits_per_weight


def passes(found: dict[str, Any]) -> bool:
    """Whether everything holds that can for the architecture."""
    outputs = [found.get(name) for name in ("rtn", "gptq", "default")]
    return (
        _is_close(found.get("loaded"))
        and _is_close(found.get("streamed"))
        and isinstance(found.get("planned"), float)
        and all(
            isinstance(output, dict)
            and _is_close(output["packed"], PACKED_CLOSE)
            and _is_close(output["streamed"])
            and _is_close(output.get("alone", 0.0), ALONE_CLOSE)
            for output in outputs
        )
    )


def _is_close(value: Any, limit: float = CLOSE) -> bool:
    return isinstance(value, float) and value < limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="values of model_type [default: all]")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    written = options.json is not None and options.json.exists()
    results: dict[str, Any] = json.loads(options.json.read_text()) if written else {}
    everything = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **IMAGE_TEXT}
    for kind in options.kinds or everything:
        with tempfile.TemporaryDirectory() as place:
            found = attempt(lambda: try_family(kind, Path(place)))  # noqa: B023
        if not isinstance(found, dict):
            found = {"refused": str(found).replace(f"{place}/", "")}
        version = {"transformers": transformers.__version__}
        results[kind] = found | {"passes": passes(found)} | version
        print(json.dumps({"kind": kind} | results[kind]), flush=True)
        if options.json:
            ordered = dict(sorted(results.items()))
            options.json.write_text(json.dumps(ordered, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
