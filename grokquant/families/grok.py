"""Grok-1: the names that SGLang, llama.cpp and our vLLM plugin read, and those of two ports."""

from transformers import PreTrainedConfig

from grokquant.families import grok_model, grok_tokenizer
from grokquant.families.family import Family, everywhere
from grokquant.families.grok_model import Grok1Config, Grok1ForCausalLM
from grokquant.families.projections import ATTENTION
from grokquant.families.remote_code import RemoteCode
from grokquant.sources.grok_config import ALIASES as FIELD_ALIASES
from grokquant.sources.grok_config import OFF, model_fields

EXPERTS = {
    "gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "up": "block_sparse_moe.experts.{expert}.w3.weight",
    "down": "block_sparse_moe.experts.{expert}.w2.weight",
}
_LAYER = r"^(model\.layers\.\d+\.)"
_EXPERT = rf"{_LAYER}(block_sparse_moe\.experts\.\d+\.)"
ALIASES = {
    # keyfan/grok-1-hf uses the names of the release.
    r"^transformer\.in_out_embed\.": "model.embed_tokens.",
    r"^transformer\.rms_norm\.": "model.norm.",
    r"^transformer\.decoder_layer\.": "model.layers.",
    rf"{_LAYER}multi_head_attention\.query\.": r"\1self_attn.q_proj.",
    rf"{_LAYER}multi_head_attention\.key\.": r"\1self_attn.k_proj.",
    rf"{_LAYER}multi_head_attention\.value\.": r"\1self_attn.v_proj.",
    rf"{_LAYER}multi_head_attention\.linear\.": r"\1self_attn.o_proj.",
    rf"{_LAYER}rms_norm\.": r"\1pre_attn_norm.",
    rf"{_LAYER}rms_norm_1\.": r"\1post_attn_norm.",
    rf"{_LAYER}rms_norm_2\.": r"\1pre_moe_norm.",
    rf"{_LAYER}rms_norm_3\.": r"\1post_moe_norm.",
    rf"{_LAYER}router\.": r"\1block_sparse_moe.gate.",
    rf"{_LAYER}moe\.(?=\d)": r"\1block_sparse_moe.experts.",
    # hpcai-tech/grok-1 names its own modules.
    rf"{_LAYER}attn\.": r"\1self_attn.",
    rf"{_LAYER}moe_block\.": r"\1block_sparse_moe.",
    r"^(model\.(?:layers\.\d+\.\w+_)?norm)\.scale$": r"\1.weight",
    # Both name an expert's matrices as the release does; GELU is applied to gate, `linear`.
    rf"{_EXPERT}linear\.": r"\1\2w1.",
    rf"{_EXPERT}linear_v\.": r"\1\2w3.",
    rf"{_EXPERT}linear_1\.": r"\1\2w2.",
}


def _engine_fields(config: PreTrainedConfig) -> dict:
    return {
        # vLLM 0.24 takes these tensor names only where this is given, else it skips them silently.
        "moe_intermediate_size": config.intermediate_size,
        # Off in xAI's code; vLLM and SGLang assume 30 and true.
        "router_logit_softcapping": 0,
        "moe_router_renormalize": False,
        # SGLang with several GPUs would look for files that are split already.
        "load_presharded_moe": False,
    }


_ASKED_BY_ENGINES = (
    "moe_intermediate_size",
    "router_logit_softcapping",
    "moe_router_renormalize",
    "load_presharded_moe",
)

REMOTE_CODE = RemoteCode(
    title="Grok-1",
    file="modeling_grok1.py",
    modules=(grok_tokenizer, grok_model),
    config="Grok1Config",
    model="Grok1ForCausalLM",
    tokenizer="Grok1Tokenizer",
)

GROK_1 = Family(
    name="grok-1",
    config_class=Grok1Config,
    model_class=Grok1ForCausalLM,
    matrices=everywhere(ATTENTION),
    experts=EXPERTS,
    unquantized=("block_sparse_moe.gate",),
    aliases=ALIASES,
    fused="block_sparse_moe.experts",
    router_norm="pre_moe_norm",
    mixture_norm="post_moe_norm",
    attention_norm="post_attn_norm",
    fields=model_fields,
    only_own_fields=True,
    engine_fields=_engine_fields,
    other_fields=frozenset({*FIELD_ALIASES, *OFF, *_ASKED_BY_ENGINES}),
    remote_code=REMOTE_CODE,
)
