"""Grok-1 out of vLLM's layers, for vLLM 0.27 and later; computes what `families/grok_model` does.

Linear layers, experts, embedding and attention are vLLM's own, so quantization and parallelism are,
too. As in xAI's code, norms and router are float32 and the top 2 gates are not renormalized.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import (
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from grokquant.errors import InputError
from grokquant.families.grok_model import Grok1Config, GrokRMSNorm
from grokquant.vllm_plugin.completeness import check_complete, expert_of


class GrokAttention(nn.Module):
    """Grouped-query attention with capped logits; q, k and v are one layer in vLLM."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        ranks = get_tensor_model_parallel_world_size()
        heads = config.num_attention_heads // ranks
        kv_heads = max(1, config.num_key_value_heads // ranks)
        head_dim = config.head_dim
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            is_neox_style=True,
        )
        self.attn = Attention(
            heads,
            head_dim,
            scale=config.attn_output_multiplier,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            logits_soft_cap=config.attn_logit_softcapping,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(x)  # (tokens, q + k + v)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        out, _ = self.o_proj(self.attn(q, k, v))
        return out


class GrokMoE(nn.Module):
    """Softmax over all experts in float32, then the top k."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.gate = ReplicatedLinear(
            config.hidden_size,
            config.num_local_experts,
            bias=False,
            params_dtype=torch.float32,
            quant_config=None,
            prefix=f"{prefix}.gate",
        )
        self.experts = FusedMoEFactory(
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=False,
            quant_config=vllm_config.quant_config,
            activation="gelu_tanh",  # "gelu" is the erf form in vLLM
            router_logits_dtype=torch.float32,
            ckpt_names=("w1", "w2", "w3"),  # gate, down, up
            prefix=f"{prefix}.experts",
        )

    def forward(self, x: Tensor) -> Tensor:
        logits, _ = self.gate(x.float())  # (tokens, experts)
        return self.experts(x, logits)


class GrokDecoderLayer(nn.Module):
    """h + norm(attention(norm(h))), then the same with experts: four norms."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = GrokAttention(vllm_config, f"{prefix}.self_attn")
        self.block_sparse_moe = GrokMoE(vllm_config, f"{prefix}.block_sparse_moe")
        self.pre_attn_norm = _norm(config)
        self.post_attn_norm = _norm(config)
        self.pre_moe_norm = _norm(config)
        self.post_moe_norm = _norm(config)

    def forward(self, positions: Tensor, h: Tensor) -> Tensor:
        h = h + self.post_attn_norm(self.self_attn(positions, self.pre_attn_norm(h)))
        return h + self.post_moe_norm(self.block_sparse_moe(self.pre_moe_norm(h)))


def _norm(config: Grok1Config) -> GrokRMSNorm:
    """In float32 whatever the model's dtype; vLLM's own norm rounds its weight to that."""
    return GrokRMSNorm(config.hidden_size, config.rms_norm_eps).float()


@support_torch_compile
class GrokModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.scale = config.embedding_multiplier_scale
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: GrokDecoderLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = _norm(config)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self.embed_input_ids(input_ids)
            h = inputs_embeds * torch.tensor(self.scale, dtype=inputs_embeds.dtype)
        else:
            assert intermediate_tensors is not None
            h = intermediate_tensors["hidden_states"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            h = layer(positions, h)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": h})
        return self.norm(h)


class Grok1ForVllm(nn.Module, SupportsPP):
    # vLLM looks up quantization by these: the name of a layer and those of its parts in files.
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.expert_parallel = vllm_config.parallel_config.enable_expert_parallel
        self.model = GrokModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size, self.config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(
            self.config.vocab_size, scale=self.config.output_multiplier_scale
        )
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads everything. Raises InputError for a tensor that is missing or unknown."""
        names: list[str] = []
        loader = AutoWeightsLoader(self)
        loaded = loader.load_weights(_noting(weights, names), mapper=self.hf_to_vllm_mapper)
        experts = set(range(self.config.num_local_experts))
        if self.expert_parallel:  # vLLM reads only the files' tensors of this rank's experts
            experts &= {number for name in names if (number := expert_of(name)) is not None}
        check_complete(names, self.config, experts)
        for name, _ in self.named_parameters():
            if name.endswith("weight_zero_point") and name not in loaded:
                raise InputError(f"{name}: the checkpoint has no zero points for it")
        return loaded


def _noting(
    weights: Iterable[tuple[str, Tensor]], names: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """`weights`, whose names are appended to `names`."""
    for name, tensor in weights:
        names.append(name)
        yield name, tensor
