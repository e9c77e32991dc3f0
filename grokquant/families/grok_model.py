"""Grok-1 in transformers' form; transformers itself has no Grok.

Follows the released JAX code: four norms a layer, attention logits capped by tanh, a float32 router
whose top-2 gates are not renormalised, a gated GELU (tanh form) and a tied head with multipliers.
Values are rounded to the working dtype where the JAX code rounds them.
"""

from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

# Queries whose logits a CPU computes at once: those of one kv head then stay in its cache.
QUERIES_AT_ONCE = 128


class Grok1Config(PreTrainedConfig):
    """The published hyperparameters of Grok-1 are the defaults.

    `attn_output_multiplier` scales the attention logits before the tanh cap of
    `attn_logit_softcapping`; the other two multipliers scale the embedding and the logits.
    """

    model_type = "grok-1"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_experts": "num_local_experts", "max_attn_value": "attn_logit_softcapping"}

    vocab_size: int = 131072
    hidden_size: int = 6144
    intermediate_size: int = 32768
    num_hidden_layers: int = 64
    num_attention_heads: int = 48
    num_key_value_heads: int = 8
    head_dim: int = 128
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    attn_output_multiplier: float = 1 / sqrt(128)
    attn_logit_softcapping: float = 30.0
    embedding_multiplier_scale: float = sqrt(6144)
    output_multiplier_scale: float = 1 / sqrt(3)
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    @property
    def expert_size(self) -> int:
        """Inner features of an expert."""
        return self.intermediate_size


class GrokRMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


def rope_tables(config: PreTrainedConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the half-split rotary embedding, float32 [batch, 1, time, head_dim]."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device)
    inverse_frequency = config.rope_theta ** (-half / config.head_dim)  # (head_dim/2)
    phase = position_ids[:, None, :, None].float() * inverse_frequency  # (batch, 1, time, hd/2)
    phase = torch.cat((phase, phase), dim=-1)  # features i and i + hd/2 rotate alike
    return phase.cos(), phase.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding to [batch, heads, time, head_dim]."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


class GrokAttention(nn.Module):
    """Grouped-query attention whose logits are capped at +-`attn_logit_softcapping` by tanh."""

    def __init__(self, config: Grok1Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        hidden = config.hidden_size
        head_dim = config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, hidden, bias=False)

    def forward(
        self,
        x: Tensor,  # (batch, time, hidden)
        position_embeddings: tuple[Tensor, ...],  # cosines, sines; Grok-2 adds temperatures
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        batch, time, _ = x.shape
        split = (batch, time, -1, self.config.head_dim)
        cos, sin = position_embeddings[:2]
        q = rotate(self.q_proj(x).view(split).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(split).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(split).transpose(1, 2)  # (batch, kv_heads, time, head_dim)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        q = q.unflatten(1, (k.shape[1], -1))  # (batch, kv_heads, heads per kv head, time, head_dim)
        # One kv head after the other: the logits of all for a long text take gigabytes.
        size = k.shape[1] if time == 1 else 1
        parts = zip(q.split(size, 1), k.split(size, 1), v.split(size, 1), strict=True)
        heads = [self._attend(*part, position_embeddings, attention_mask) for part in parts]
        attended = torch.cat(heads, 1).flatten(1, 2).transpose(1, 2).reshape(batch, time, -1)
        return self.o_proj(attended)

    def _attend(
        self,
        q: Tensor,  # (batch, kv_heads, heads per kv head, time, head_dim)
        k: Tensor,  # (batch, kv_heads, keys, head_dim)
        v: Tensor,
        position_embeddings: tuple[Tensor, ...],
        attention_mask: Tensor | None,
    ) -> Tensor:
        size = QUERIES_AT_ONCE if q.device.type == "cpu" else q.shape[-2]
        attended = []
        for start in range(0, q.shape[-2], size):
            some = slice(start, start + size)
            tables = tuple(table[..., some, :] for table in position_embeddings)
            mask = None if attention_mask is None else attention_mask[..., some, :]
            attended.append(self._attend_from(q[..., some, :], k, v, tables, mask))
        return torch.cat(attended, -2)

    def _attend_from(
        self,
        q: Tensor,  # (batch, kv_heads, heads per kv head, queries, head_dim)
        k: Tensor,
        v: Tensor,
        position_embeddings: tuple[Tensor, ...],
        attention_mask: Tensor | None,
    ) -> Tensor:
        logits = (q @ k.unsqueeze(2).transpose(-1, -2)).float() * self.config.attn_output_multiplier
        cap = self.config.attn_logit_softcapping
        logits = cap * torch.tanh(logits / cap)  # (batch, kv_heads, per kv, queries, keys)
        logits = self.at_positions(logits, position_embeddings)
        if attention_mask is not None:
            logits = logits + attention_mask.unsqueeze(1)
        return logits.softmax(-1).to(v.dtype) @ v.unsqueeze(2)

    def at_positions(self, logits: Tensor, position_embeddings: tuple[Tensor, ...]) -> Tensor:
        """Capped logits, changed by the positions of their queries in Grok-2 only."""
        return logits


class GrokRouter(nn.Module):
    """Softmax over all experts in float32, then the top k, not renormalised."""

    def __init__(self, config: Grok1Config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [tokens, experts], the top k gates and their experts [tokens, k]."""
        logits = self.capped(F.linear(x.float(), self.weight.float()))
        gates, experts = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, gates, experts

    def capped(self, logits: Tensor) -> Tensor:
        """Logits have no cap here."""
        return logits


@use_experts_implementation
class GrokExperts(nn.Module):
    """All experts of a block, gate and up fused: transformers' 3-D form."""

    def __init__(self, config: Grok1Config) -> None:
        super().__init__()
        experts = config.num_local_experts
        hidden = config.hidden_size
        inner = config.expert_size
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """Hidden units [tokens, inner] of gate_up [tokens, 2 * inner], computed in float32."""
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        mixed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)  # (tokens, hidden)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            inner = self._apply_gate(F.linear(x[token], self.gate_up_proj[expert]))
            out = F.linear(inner, self.down_proj[expert]).float()  # (routed, hidden)
            weight = top_k_weights[token, slot, None].to(x.dtype).float()
            mixed.index_add_(0, token, out * weight)
        return mixed.to(x.dtype)


class GrokMoE(nn.Module):
    router_class: type[GrokRouter] = GrokRouter

    def __init__(self, config: Grok1Config) -> None:
        super().__init__()
        self.gate = self.router_class(config)
        self.experts = GrokExperts(config)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (batch * time, hidden)
        _, gates, experts = self.gate(tokens)
        return self.experts(tokens, experts, gates).view_as(x)


class GrokDecoderLayer(nn.Module):
    """h + norm(attention(norm(h))), then the same with experts: four norms."""

    attention_class: type[GrokAttention] = GrokAttention
    moe_class: type[GrokMoE] = GrokMoE

    def __init__(self, config: Grok1Config, layer_idx: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        eps = config.rms_norm_eps
        self.self_attn = self.attention_class(config, layer_idx)
        self.block_sparse_moe = self.moe_class(config)
        self.pre_attn_norm = GrokRMSNorm(hidden, eps)
        self.post_attn_norm = GrokRMSNorm(hidden, eps)
        self.pre_moe_norm = GrokRMSNorm(hidden, eps)
        self.post_moe_norm = GrokRMSNorm(hidden, eps)

    def forward(
        self,
        h: Tensor,
        position_embeddings: tuple[Tensor, ...],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        attended = self.self_attn(
            self.pre_attn_norm(h), position_embeddings, attention_mask, past_key_values
        )
        h = h + self.post_attn_norm(attended)
        return h + self.post_moe_norm(self.feed_forward(self.pre_moe_norm(h)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.block_sparse_moe(x)


class Grok1PreTrainedModel(PreTrainedModel):
    config_class = Grok1Config
    incomplete: type[Exception] = ValueError  # of checkpoints where tensors are missing
    base_model_prefix = "model"
    _no_split_modules = ["GrokDecoderLayer"]
    # The JAX code keeps router and norms in float32.
    _keep_in_fp32_modules_strict = [
        "block_sparse_moe.gate",
        "pre_attn_norm",
        "post_attn_norm",
        "pre_moe_norm",
        "post_moe_norm",
        "model.norm",
    ]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, but raises `incomplete` where that would invent missing weights, and
        experts have the dtype of the model, not that of their scales in the checkpoint."""
        path = pretrained_model_name_or_path
        info_wanted = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(path, *model_args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            text = f"{path}: {missing[0]} is missing; transformers would randomize it"
            raise cls.incomplete(text)
        for module in model.modules():
            if isinstance(module, GrokExperts):
                module.to(model.config.dtype)
        return (model, info) if info_wanted else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, GrokExperts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, GrokRouter):
            nn.init.normal_(module.weight, std=std)


class Grok1Model(Grok1PreTrainedModel):
    layer_class: type[GrokDecoderLayer] = GrokDecoderLayer

    def __init__(self, config: Grok1Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [self.layer_class(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = GrokRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm [batch, time, hidden]."""
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(h.shape[1], device=h.device).unsqueeze(0) + past
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=h,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        h = h * torch.tensor(self.config.embedding_multiplier_scale, dtype=h.dtype)
        tables = self.position_tables(position_ids)
        for layer in self.layers:
            h = layer(h, tables, mask, past_key_values)
        return self.norm(h)

    def position_tables(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        """The tables that layers need for positions [batch, time]."""
        return rope_tables(self.config, position_ids)


class Grok1ForCausalLM(Grok1PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    base_class: type[Grok1Model] = Grok1Model

    def __init__(self, config: Grok1Config) -> None:
        super().__init__(config)
        self.model = self.base_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        h = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        # As in transformers: a number of last positions (0 keeps all), or indices.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, kept])
        logits = logits * torch.tensor(self.config.output_multiplier_scale, dtype=logits.dtype)
        logits = self.capped(logits)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def capped(self, logits: Tensor) -> Tensor:
        """Logits have no cap here."""
        return logits


def _experts_of_files() -> list[WeightConverter | WeightRenaming]:
    """How files name what `GrokExperts` fuses: w1, w3 and w2 of every expert."""
    stacked = MergeModulelist(dim=0)
    experts = "block_sparse_moe.experts"
    gate_up = [f"{experts}.*.{part}.weight" for part in ("w1", "w3")]
    return [
        WeightConverter(gate_up, f"{experts}.gate_up_proj", [stacked, Concatenate(dim=1)]),
        WeightConverter(f"{experts}.*.w2.weight", f"{experts}.down_proj", [stacked]),
    ]


register_checkpoint_conversion_mapping(Grok1Config.model_type, _experts_of_files(), overwrite=True)

# Files of `output.remote_code` end here.


def _register() -> None:
    """Makes the Auto classes of transformers know Grok-1; no remote code is involved."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from grokquant.errors import InputError
    from grokquant.families.grok_tokenizer import Grok1Tokenizer

    Grok1PreTrainedModel.incomplete = InputError
    AutoConfig.register(Grok1Config.model_type, Grok1Config, exist_ok=True)
    AutoModelForCausalLM.register(Grok1Config, Grok1ForCausalLM, exist_ok=True)
    AutoTokenizer.register(Grok1Config, slow_tokenizer_class=Grok1Tokenizer, exist_ok=True)


_register()  # here, so that whoever has a Grok1Config can go on with AutoModelForCausalLM
