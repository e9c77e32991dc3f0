"""HQQ, its own defaults but for the axis of groups, 1 as its kernels ask for; experts alone.

Its code for whole models leaves experts out that transformers holds in one tensor, so each matrix
of the checkpoint is given to it apart. It sees no calibration tokens.
"""

import json
import shutil
from pathlib import Path

from given import given
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def quantized(name: str, weight: Tensor, config: dict) -> dict[str, Tensor]:
    """The tensors that stand for the matrix called `name`."""
    linear = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    linear.weight.data = weight
    made = HQQLinear(linear, config, compute_dtype=weight.dtype, device="cpu")
    stem = name.removesuffix("weight")
    return {stem + key: value.contiguous() for key, value in made.state_dict().items()}


asked = given()
config = BaseQuantizeConfig(nbits=asked.bits, group_size=asked.group, axis=1)
source = Path(asked.model)
output = Path(asked.output)
output.mkdir()
for path in source.glob("*token*"):
    shutil.copy(path, output)
for path in source.glob("*.safetensors"):
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(path).items():
        is_expert = ".experts." in name
        tensors |= quantized(name, weight, config) if is_expert else {name: weight}
    save_file(tensors, output / path.name, metadata={"format": "pt"})
settings = json.loads((source / "config.json").read_text())
settings["quantization_config"] = {"quant_method": "hqq", "quant_config": config}
(output / "config.json").write_text(json.dumps(settings, default=str))
