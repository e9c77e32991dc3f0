"""AutoRound, 200 iterations for each block; experts alone."""

from pathlib import Path

import torch
from auto_round import AutoRound
from given import given
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8

asked = given()
model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(asked.model)
layers = range(model.config.num_hidden_layers)
attention = (f"model.layers.{i}.self_attn.{part}_proj" for i in layers for part in "qkvo")
rounding = AutoRound(
    model,
    tokenizer,
    bits=asked.bits,
    group_size=asked.group,
    sym=True,
    iters=200,
    batch_size=BATCH,
    seqlen=len(asked.rows[0]),
    nsamples=len(asked.rows),
    dataset=list(torch.tensor(asked.rows).split(BATCH)),
    layer_config={name: {"bits": 16} for name in attention},
)
rounding.quantize_and_save(asked.output, format="auto_round")
# It writes into a directory of its own below the one that it is given.
(written,) = Path(asked.output).iterdir()
for path in written.iterdir():
    path.rename(Path(asked.output) / path.name)
written.rmdir()
