"""Grok-2 in transformers' form, on top of Grok-1; transformers itself has neither.

There is no released model code; this follows SGLang's models/grok.py and its attention kernels. A
dense MLP runs beside the experts, the logits of the router and of the head are capped by tanh, and
the attention logits of queries at far positions grow with the logarithm of the position.
"""

from math import log2, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grokquant.families.grok_model import (
    Grok1Config,
    Grok1ForCausalLM,
    Grok1Model,
    GrokAttention,
    GrokDecoderLayer,
    GrokMoE,
    GrokRouter,
)


class Grok2Config(Grok1Config):
    """The published hyperparameters of Grok-2 are the defaults.

    `intermediate_size` belongs to the dense MLP, `moe_intermediate_size` to the experts. Attention
    logits of queries beyond position `attn_temperature_len` are multiplied by log2(position) /
    log2(attn_temperature_len); -1 turns that off.
    """

    # So says xAI's config.json. In transformers it names another model, which Auto classes would
    # take; so this class is not registered with them, and `grokquant.load` goes by `architectures`.
    model_type = "git"

    hidden_size: int = 8192
    num_attention_heads: int = 64
    moe_intermediate_size: int = 16384
    residual_moe: bool = True
    embedding_multiplier_scale: float = sqrt(8192)
    output_multiplier_scale: float = 0.5
    router_logit_softcapping: float = 30.0
    final_logit_softcapping: float = 50.0
    attn_temperature_len: int = 1024
    rope_theta: float = 208533496.0
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = False

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size


def soft_capped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


class Grok2Attention(GrokAttention):
    def at_positions(self, logits: Tensor, position_embeddings: tuple[Tensor, ...]) -> Tensor:
        """Capped logits times the temperatures of their queries."""
        # The temperatures follow the cosines and sines, see Grok2Model.position_tables.
        return logits * position_embeddings[2].unsqueeze(1)


class Grok2Router(GrokRouter):
    def __init__(self, config: Grok2Config) -> None:
        super().__init__(config)
        self.cap = config.router_logit_softcapping

    def capped(self, logits: Tensor) -> Tensor:
        return soft_capped(logits, self.cap)


class Grok2MoE(GrokMoE):
    router_class = Grok2Router


class Grok2MLP(nn.Module):
    """A gated GELU (tanh form); like the experts, it computes hidden units in float32."""

    def __init__(self, config: Grok2Config) -> None:
        super().__init__()
        hidden = config.hidden_size
        inner = config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.gate_proj(x).float(), approximate="tanh") * self.up_proj(x).float()
        return self.down_proj(inner.to(x.dtype))


class Grok2DecoderLayer(GrokDecoderLayer):
    attention_class = Grok2Attention
    moe_class = Grok2MoE

    def __init__(self, config: Grok2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = Grok2MLP(config)

    def feed_forward(self, x: Tensor) -> Tensor:
        return (self.mlp(x) + self.block_sparse_moe(x)) / sqrt(2)


class Grok2Model(Grok1Model):
    config_class = Grok2Config
    layer_class = Grok2DecoderLayer
    _no_split_modules = ["Grok2DecoderLayer"]

    def position_tables(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Cosines, sines, and the temperatures of queries, float32 [batch, 1, time, 1]."""
        temperature = torch.ones(position_ids.shape, device=position_ids.device)
        length = self.config.attn_temperature_len
        if length > 0:
            far = position_ids > length
            grown = position_ids.clamp(min=1).float().log2() / log2(length)
            temperature = torch.where(far, grown, temperature)
        return *super().position_tables(position_ids), temperature[:, None, :, None]


class Grok2ForCausalLM(Grok1ForCausalLM):
    config_class = Grok2Config
    base_class = Grok2Model

    def capped(self, logits: Tensor) -> Tensor:
        return soft_capped(logits, self.config.final_logit_softcapping)
