"""GPTQ by GPTQModel, its own defaults; experts alone."""

import os

# With two CPUs or fewer, loading asks for more workers than there are.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from given import given
from gptqmodel import GPTQModel, QuantizeConfig

asked = given()
config = QuantizeConfig(
    bits=asked.bits,
    group_size=asked.group,
    dynamic={r"-:.*self_attn.*": {}},  # the minus leaves these modules as they are
)
model = GPTQModel.load(asked.model, config)
rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in asked.rows]
model.quantize(rows, batch_size=8)
model.save(asked.output)
