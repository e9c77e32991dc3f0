"""Has a library quantize a small matrix in each of its ways: its tensors and what they stand for.

    python write_packed.py hqq|torchao|quark FILE.safetensors

Tensors of a way are called WAY/NAME, the matrix that the library dequantizes WAY/dense. The files
in tests/recorded are what this wrote.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STEM = "model.layers.0.self_attn.q_proj"  # a matrix [64, 64] of the models in the tests


def linear() -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(64, 64, bias=False)
    # Away from zero on average, so that zero points matter.
    made.weight.data.add_(0.02)
    return made.to(torch.bfloat16)


def of_hqq() -> Iterator[tuple[str, dict[str, Tensor]]]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for bits in (8, 4, 3, 2, 1):
        for axis in (0, 1):
            config = BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
            made = HQQLinear(linear(), config, compute_dtype=torch.bfloat16, device="cpu")
            tensors = {f"{STEM}.{name}": value for name, value in made.state_dict().items()}
            yield f"{bits} bits, axis {axis}", tensors | {"dense": made.dequantize()}


def of_torchao() -> Iterator[tuple[str, dict[str, Tensor]]]:
    from torchao import quantization as q
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization.quant_primitives import MappingType

    group = q.PerGroup(32)
    ways = {
        "int8 rows": q.Int8WeightOnlyConfig(version=2),
        "int8 and activations": q.Int8DynamicActivationInt8WeightConfig(version=2),
        "int4 groups": q.IntxWeightOnlyConfig(torch.int4, group),
        "int4 groups, asymmetric": q.IntxWeightOnlyConfig(
            torch.int4, group, MappingType.ASYMMETRIC
        ),
        "float8 rows": q.Float8WeightOnlyConfig(),
    }
    for way, config in ways.items():
        model = nn.Sequential(linear())
        q.quantize_(model, config)
        dense = model[0].weight.dequantize()
        tensors, _ = flatten_tensor_state_dict(model.state_dict())
        named = {f"{STEM}.{name.partition('.')[2]}": value for name, value in tensors.items()}
        yield way, named | {"dense": dense}


def of_quark() -> Iterator[tuple[str, dict[str, Tensor]]]:
    from quark.torch import ModelQuantizer, export_safetensors
    from quark.torch.quantization.config import config as q
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    rows = {"symmetric": True, "scale_type": "float", "round_method": "half_even", "ch_axis": 0}
    minimum = {"observer_method": "min_max", "is_dynamic": False}
    ways = {
        "fp8": q.FP8E4M3PerTensorSpec(**minimum),
        "mxfp4": q.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False),
        "int8 rows": q.Int8PerChannelSpec(**rows, is_dynamic=False),
    }
    for way, spec in ways.items():
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).to(torch.bfloat16)
        model.model.layers[0].self_attn.q_proj.weight.data = linear().weight.data
        layer = q.QLayerConfig(weight=spec.to_quantization_spec())
        quantizer = ModelQuantizer(q.QConfig(global_quant_config=layer, exclude=["lm_head"]))
        model = quantizer.freeze(quantizer.quantize_model(model, None))
        # Its linear modules round the weight as they run.
        dense = model.model.layers[0].self_attn.q_proj(torch.eye(64, dtype=torch.bfloat16)).T
        with TemporaryDirectory() as directory:
            export_safetensors(model, directory)
            tensors = load_file(Path(directory) / "model.safetensors")
        yield way, {n: t for n, t in tensors.items() if STEM in n} | {"dense": dense}


def main() -> None:
    library, path = sys.argv[1:]
    ways = {"hqq": of_hqq, "torchao": of_torchao, "quark": of_quark}[library]()
    found = {f"{way}/{name}": value for way, tensors in ways for name, value in tensors.items()}
    save_file({name: value.detach().contiguous() for name, value in found.items()}, path)


if __name__ == "__main__":
    main()
