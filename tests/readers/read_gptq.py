"""gptqmodel's view of a checkpoint: read_gptq.py DIRECTORY TOKENS.npy FOUND.safetensors

TOKENS are [rows, time]; FOUND holds `logits` [rows, time, vocabulary] and, by the names of modules,
every matrix [out, in] that gptqmodel multiplies out. Runs where gptqmodel is installed, and knows
nothing of grokquant.
"""

import os
import sys

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # 7.6.0 asks for two on any machine
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes minutes, what it compiles milliseconds

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors.torch import save_file

directory, tokens, found = sys.argv[1:]
model = GPTQModel.load(directory, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
with torch.no_grad():
    matrices = {
        name: module.dequantize_weight().T.contiguous()
        for name, module in model.model.named_modules()
        if isinstance(module, BaseQuantLinear)
    }
    logits = model.model(torch.from_numpy(np.load(tokens))).logits
save_file(matrices | {"logits": logits.contiguous()}, found)
