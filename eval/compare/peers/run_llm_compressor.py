"""GPTQ by llm-compressor, its own defaults but for experts, which see the tokens routed to them
(its default, all tokens for all experts, gives a higher divergence); experts alone."""

from datasets import Dataset
from given import given
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

asked = given()
weights = {"num_bits": asked.bits, "type": "int", "symmetric": True, "strategy": "group"}
scheme = {"targets": ["Linear"], "weights": weights | {"group_size": asked.group}}
recipe = GPTQModifier(
    config_groups={"experts": scheme},
    ignore=["lm_head", "re:.*self_attn.*", "re:.*gate$"],
)
model = AutoModelForCausalLM.from_pretrained(asked.model, dtype="bfloat16")
masks = [[1] * len(row) for row in asked.rows]
oneshot(
    model=model,
    dataset=Dataset.from_dict({"input_ids": asked.rows, "attention_mask": masks}),
    recipe=recipe,
    max_seq_length=len(asked.rows[0]),
    num_calibration_samples=len(asked.rows),
    shuffle_calibration_samples=False,
    moe_calibrate_all_experts=False,
)
model.save_pretrained(asked.output, save_compressed=True)
AutoTokenizer.from_pretrained(asked.model).save_pretrained(asked.output)
