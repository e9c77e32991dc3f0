"""The configuration of a release: its config.json, what the files tell, or the real Grok-1."""

import json
from pathlib import Path

from grokquant.errors import InputError
from grokquant.files.json_objects import read_json_object

# The field of each dimension letter in `release.LeafSpec`.
CONFIG_OF_DIMENSION = {
    "V": "vocab_size",
    "D": "hidden_size",
    "E": "num_local_experts",
    "F": "intermediate_size",
}
ALIASES = {
    "num_experts": "num_local_experts",
    "max_attn_value": "attn_logit_softcapping",
    "max_attn_val": "attn_logit_softcapping",
}
LARGEST = {int: 2**24, float: 2**31}  # far above any model; more is damage
FIELDS: dict[str, type] = {
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "vocab_size": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "num_local_experts": int,
    "num_experts_per_tok": int,
    "attn_output_multiplier": float,
    "embedding_multiplier_scale": float,
    "output_multiplier_scale": float,
    "attn_logit_softcapping": float,
    "rms_norm_eps": float,
    "rope_theta": float,
    "max_position_embeddings": int,
}
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
DEFAULTS = {
    "model_type": "grok-1",
    "architectures": ["Grok1ForCausalLM"],
    "num_experts_per_tok": 2,
    "attn_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
# Settings of relatives of Grok-1. Here they must be absent or have one of these values: off.
OFF: dict[str, tuple] = {
    "residual_moe": (False,),
    "final_logit_softcapping": (0,),
    "attn_temperature_len": (0, -1),
    "rope_scaling": (),
    "rope_type": ("default",),
    "hidden_act": ("gelu", "gelu_new", "gelu_tanh", "gelu_pytorch_tanh"),
}
# Defaults of the class GrokForCausalLM that contradict the released model code.
PORT = "GrokForCausalLM"
WRONG_DEFAULTS = {
    "hidden_act": "silu",
    "rope_theta": 1e5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
PUBLISHED_SHAPES = {
    "hidden_size": 6144,
    "intermediate_size": 32768,
    "vocab_size": 131072,
    "num_local_experts": 8,
}
PUBLISHED_ATTENTION = {"q_proj": 6144, "kv_proj": 1024}
PUBLISHED = {
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts_per_tok": 2,
    "attn_output_multiplier": 0.08838834764831845,
    "embedding_multiplier_scale": 78.38367176906169,
    "output_multiplier_scale": 0.5773502691896257,
}


def read_config(path: Path) -> dict:
    """The Grok fields of a config.json, aliases renamed; all other fields are ignored.

    Raises InputError naming the file and the field that has the wrong type or value.
    """
    return grok_fields(path, read_json_object(path))


def grok_fields(path: Path, raw: dict) -> dict:
    """`read_config` for parsed content; `path` is named in errors."""
    config: dict = {}
    for key, value in _settings(path, raw).items():
        name = ALIASES.get(key, key)
        if name in OFF and value is not None and value not in OFF[name]:
            found = json.dumps(value)[:40]
            raise InputError(f"{path}: {key} is {found}, which Grok-1 does not support")
        if name in FIELDS:
            value = positive_number(path, key, value, FIELDS[name])
        elif name in TOKENS:
            _check_token(path, key, value)
        elif name != "tie_word_embeddings":
            continue
        elif value is not True:
            raise InputError(f"{path}: tie_word_embeddings must be true, Grok-1 has no other head")
        if config.setdefault(name, value) != value:
            raise InputError(f"{path}: {key} is {value}, but its alias says {config[name]}")
    return config


def _settings(path: Path, raw: dict) -> dict:
    """The fields of a config.json without wrong defaults, joined by those of rope_parameters."""
    wrong = WRONG_DEFAULTS if raw.get("architectures") == [PORT] else {}
    settings = {key: value for key, value in raw.items() if key not in wrong or wrong[key] != value}
    rotary = settings.get("rope_parameters") or {}
    if not isinstance(rotary, dict):
        raise InputError(f"{path}: rope_parameters must be an object")
    known = {key: rotary[key] for key in ("rope_theta", "rope_type") if key in rotary}
    for key, value in known.items():
        if settings.setdefault(key, value) != value:
            raise InputError(f"{path}: {key} is {settings[key]}, rope_parameters says {value}")
    return settings


def complete_config(
    path: Path, given: dict, derived: dict[str, int], attention: dict[str, int]
) -> tuple[dict, bool]:
    """The full configuration, and whether all shapes are those of the published Grok-1.

    `given` comes from config.json, `derived` from the files; `attention` holds the output widths
    of q_proj and kv_proj. Raises InputError for contradictions and for missing fields.
    """
    for name, value in derived.items():
        if given.get(name, value) != value:
            raise InputError(f"{path}: {name} is {given[name]}, but the files have {value}")
    published = PUBLISHED_SHAPES.items() <= derived.items() and attention == PUBLISHED_ATTENTION
    known = PUBLISHED if published else {}
    config = known | given | derived
    if (heads := config.get("num_attention_heads")) and heads <= attention["q_proj"]:
        config.setdefault("head_dim", attention["q_proj"] // heads)
    config = model_fields(path, config)
    _check_heads(path, config, attention)
    return config, published


def model_fields(path: Path, raw: dict) -> dict:
    """The Grok fields of a config.json, with defaults.

    Raises InputError where one without a default is missing or two contradict each other.
    """
    given = DEFAULTS | grok_fields(path, raw)
    missing = [name for name in FIELDS if name not in given and name != "head_dim"]
    if missing:
        raise InputError(f"{path}: config.json must also give {', '.join(missing)}")
    if given["num_attention_heads"] % given["num_key_value_heads"]:
        raise InputError(f"{path}: num_attention_heads is not a multiple of num_key_value_heads")
    if given["num_experts_per_tok"] > given["num_local_experts"]:
        raise InputError(f"{path}: num_experts_per_tok is larger than num_local_experts")
    return {"head_dim": given["hidden_size"] // given["num_attention_heads"]} | given


def _check_heads(path: Path, config: dict, attention: dict[str, int]) -> None:
    checks = (("num_attention_heads", "q_proj"), ("num_key_value_heads", "kv_proj"))
    for heads, projection in checks:
        width = config[heads] * config["head_dim"]
        if width != attention[projection]:
            raise InputError(
                f"{path}: {heads} {config[heads]} times head_dim {config['head_dim']} is {width}, "
                f"but the files' {projection} has {attention[projection]}"
            )


def positive_number(path: Path, key: str, value: object, kind: type) -> int | float:
    """A positive int or float, as `kind` says. Raises InputError naming file and key."""
    if type(value) not in (int, kind) or not 0 < value <= LARGEST[kind]:  # type: ignore[operator]
        wanted = "a positive whole number" if kind is int else "a positive number"
        raise InputError(f"{path}: {key} must be {wanted}, not {json.dumps(value)[:40]}")
    return kind(value)  # type: ignore[arg-type]


def _check_token(path: Path, key: str, value: object) -> None:
    if value is not None and (type(value) is not int or value < 0):
        raise InputError(f"{path}: {key} must be a token id, not {json.dumps(value)[:40]}")
