"""vLLM's log-probabilities: run_vllm.py DIRECTORY DTYPE TOKENS.npy FOUND.safetensors

The metadata of FOUND say what vLLM's version is, which grid it gave each of its modules, and for
which of them it has no kernel here.

Runs on a CPU. vLLM has CPU kernels for a few packed layers only. For the others everything is its
own: how it matches the config, makes parameters, loads and splits them, and what Marlin refuses.
Only the product is computed here, with the matrix that its parameters hold multiplied out.
"""

import json
import os
import sys
from importlib.metadata import version

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # with AMX it rounds the inputs of int4 layers to int8
}

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm import _custom_ops as custom_ops
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.quantization import auto_gptq
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as ct_moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_wNa16 as ct_linear,
)
from vllm.model_executor.layers.quantization.utils.marlin_utils import (
    MARLIN_SUPPORTED_GROUP_SIZES,
    check_moe_marlin_supports_config,
)
from vllm.scalar_type import scalar_types

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
replaced: set[str] = set()  # layers whose kernel is ours


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] to unsigned codes [..., n * 32 / bits], the lowest bits first."""
    shifts = torch.arange(0, 32, bits)
    codes = (words.unsqueeze(-1).to(torch.int64) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)


def dense(words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """The matrix [..., out, in] of words [..., out, words], scales and packed zero points
    [..., out / codes in a word, groups]."""
    codes = unpacked(words, bits)
    offset = 2 ** (bits - 1)
    if zeros is not None:
        offset = unpacked(zeros.mT, bits).mT.repeat_interleave(
            codes.shape[-1] // zeros.shape[-1], -1
        )
    repeated = scales.repeat_interleave(codes.shape[-1] // scales.shape[-1], -1)
    return (codes - offset).to(scales.dtype) * repeated


class DequantizedLinear(MPLinearKernel):
    """Takes what Marlin would, which is 4 and 8 bits in the groups that a recipe can name."""

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @classmethod
    def can_implement(cls, c) -> tuple[bool, str | None]:
        return c.group_size in (-1, 32, 64, 128), "group"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        words, scales, zeros, *_ = self._get_weight_params(layer)  # 0.27 gives g_idx, too
        if words.output_dim == 1:  # gptq stores [in, out]; its zero points are those of symmetry
            words, scales, zeros = words.mT, scales.mT, None
        if not self.config.zero_points:
            zeros = None
        layer.multiplied_out = dense(words, scales, zeros, self.config.weight_type.size_bits)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.multiplied_out, bias)


def or_dequantized(choose):
    def chosen(config, **options):
        try:
            return choose(config, **options)
        except ValueError:
            replaced.add(f"linear of {config.weight_type.size_bits} bits")
            return DequantizedLinear

    return chosen


def as_if_marlin(config, weight_key, quant_config, **options):
    """Marlin's own rules, asked for the backend that has no kernel here."""
    group = -1 if quant_config.group_size is None else quant_config.group_size
    assert check_moe_marlin_supports_config(config, group, True), "Marlin refuses the shape"
    assert MarlinExperts._supports_activation(config.activation), "Marlin refuses the activation"
    assert MarlinExperts._supports_quant_scheme(weight_key, None), "Marlin refuses the grid"
    replaced.add(f"experts of {weight_key.dtype.size_bits} bits")
    return WNA16MoEBackend.MARLIN, MarlinExperts


def verify_as_marlin(quant_type, group_size: int) -> None:
    """`verify_marlin_supported` of a GPU."""
    assert quant_type in (scalar_types.uint4b8, scalar_types.uint8b128), "Marlin refuses the type"
    assert group_size in MARLIN_SUPPORTED_GROUP_SIZES, "Marlin refuses the group"


def multiply_out(method, layer: nn.Module) -> None:
    for name in ("w13", "w2"):
        if isinstance(method, auto_gptq.AutoGPTQMoEMethod):
            bits, zeros = method.quant_config.quant_type.size_bits, None
            words = getattr(layer, f"{name}_qweight").mT
            scales = getattr(layer, f"{name}_scales").mT
        else:
            bits = method.num_bits
            words = getattr(layer, f"{name}_weight_packed")
            scales = getattr(layer, f"{name}_weight_scale")
            zeros = getattr(layer, f"{name}_weight_zero_point", None)
            if method.is_transposed:  # in 0.27, whatever the backend
                words, scales = words.mT, scales.mT
                zeros = None if zeros is None else zeros.mT
        setattr(layer, f"{name}_dense", dense(words, scales, zeros, bits))


def apply_experts(method, layer, x, topk_weights, topk_ids, **shared) -> Tensor:
    mixed = torch.zeros(x.shape, dtype=torch.float32)
    for local, (w13, w2) in enumerate(zip(layer.w13_dense, layer.w2_dense, strict=True)):
        number = local if layer.expert_map is None else layer.expert_map.tolist().index(local)
        token, slot = torch.where(topk_ids == number)
        gate, up = F.linear(x[token], w13).float().chunk(2, dim=-1)
        inner = (ACTIVATIONS[method.moe.activation.value](gate) * up).to(x.dtype)
        out = F.linear(inner, w2).float() * topk_weights[token, slot, None]
        mixed.index_add_(0, token, out)
    return mixed.to(x.dtype)


def topk_softmax(
    weights: Tensor, indices: Tensor, _: Tensor, logits: Tensor, renormalize: bool, **padding
) -> None:
    """The top gates of each token, written to `weights` and `indices` [tokens, top]."""
    gates, experts = logits.float().softmax(-1).topk(weights.shape[1])
    weights.copy_(gates / gates.sum(-1, keepdim=True) if renormalize else gates)
    indices.copy_(experts)


def replace_kernels() -> None:
    if not hasattr(torch.ops._moe_C, "topk_softmax"):  # 0.27 has it on GPUs only
        custom_ops.topk_softmax = topk_softmax
    for module in (ct_linear, auto_gptq):
        module.choose_mp_linear_kernel = or_dequantized(module.choose_mp_linear_kernel)
    auto_gptq.verify_marlin_supported = verify_as_marlin
    methods = {
        ct_moe: ct_moe.CompressedTensorsWNA16MoEMethod,
        auto_gptq: auto_gptq.AutoGPTQMoEMethod,
    }
    for module, method in methods.items():
        module.select_wna16_moe_backend = as_if_marlin
        method.process_weights_after_loading = multiply_out
        method.get_fused_moe_quant_config = lambda method, layer: None
        method.apply = apply_experts


def grids_of(model: nn.Module) -> dict[str, list[int] | None]:
    """Bits and group that vLLM gave each of its modules, None to those that are not quantized."""
    found: dict[str, list[int] | None] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        found[name] = None
        for place in (
            getattr(module, "scheme", None),
            method,
            getattr(method, "quant_config", None),
        ):
            bits = getattr(place, "num_bits", None) or getattr(place, "weight_bits", None)
            if bits is not None:
                found[name] = [bits, place.group_size]
    return found


def main(path: str, dtype: str, tokens_path: str, found_path: str) -> None:
    replace_kernels()
    if dtype == "float32":  # for which 0.27 refuses experts where it sees AMX
        torch.cpu._is_amx_tile_supported = lambda: False
    torch.cpu._init_amx()  # its int4 kernel for AMX does not ask Linux for the permission itself
    tokens = np.load(tokens_path)  # (rows, time)
    llm = LLM(path, dtype=dtype, max_model_len=256, max_logprobs=-1, enforce_eager=True)
    every = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": row.tolist()} for row in tokens], every)
    rows = []
    for output in outputs:
        for scores in output.prompt_logprobs[1:]:
            row = torch.full((llm.model_config.get_vocab_size(),), -torch.inf)
            row[list(scores)] = torch.tensor([score.logprob for score in scores.values()])
            rows.append(row)
    logprobs = torch.stack(rows).view(len(tokens), -1, rows[0].numel())
    (grids,) = llm.apply_model(grids_of)
    notes = {
        "engine": f"vllm-cpu {version('vllm-cpu')}",
        "grids": json.dumps(grids),
        "replaced": ", ".join(sorted(replaced)),
    }
    save_file({"logprobs": logprobs}, found_path, metadata=notes)


if __name__ == "__main__":
    main(*sys.argv[1:])
