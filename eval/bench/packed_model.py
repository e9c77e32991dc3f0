"""Tokens a second of a whole Mixtral of .7 G random weights: packed int4 against bf16, in turn.

    python eval/bench/packed_model.py [--tokens N] [--repeats N] [--threads N]
                                      [--work DIR]

Both generate greedily after a prompt of 32 tokens: transformers' bf16 model with its fused experts,
and `grokquant.load` of the same model rounded to int4 in groups of 128. `seconds` are those of one
token, medians over runs, without the first (it reads the weights): CPU time on one thread, which
other work on the machine changes least, else time that passed. `open` is what `load` takes, and
`first` the first run. `resident` is the memory that a process of its own adds above its imports.
Prints one JSON line.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import measure
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import grokquant

PROMPT = 32
CONFIG = MixtralConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    num_local_experts=8,
    max_position_embeddings=2048,
)


def make_models(directory: Path) -> tuple[Path, Path]:
    """The directories of the bf16 model and of its int4 output."""
    dense = directory / "bf16"
    if not dense.exists():
        torch.manual_seed(0)
        MixtralForCausalLM(CONFIG).bfloat16().save_pretrained(dense)
    output = directory / "int4"
    if not output.exists():
        rule = {"match": "*", "method": "rtn", "bits": 4, "group": 128, "scale": "absmax"}
        recipe = {
            "model": {"path": str(dense)},
            "quantize": [rule],
            "output": {"path": str(output)},
        }
        grokquant.quantize(recipe)
    return dense, output


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = run()
    return result, clock() - start


def per_token(model: Any, prompt: Tensor, tokens: int) -> float:
    """Seconds a token, the prompt's pass subtracted."""
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    _, short = timed(lambda: model.generate(prompt, max_new_tokens=1, **options))
    _, long = timed(lambda: model.generate(prompt, max_new_tokens=1 + tokens, **options))
    return (long - short) / tokens


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "packed-model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense_path, output = make_models(options.work)
    prompt = torch.randint(0, CONFIG.vocab_size, (1, PROMPT))
    before = resident()
    (ours, _), opened = timed(lambda: grokquant.load(output))
    _, first = timed(lambda: per_token(ours, prompt, 1))
    added = resident() - before
    theirs = AutoModelForCausalLM.from_pretrained(dense_path, dtype=torch.bfloat16)
    per_token(theirs, prompt, 1)
    of_ours = []
    of_theirs = []
    for _ in range(options.repeats):
        of_theirs.append(per_token(theirs, prompt, options.tokens))
        of_ours.append(per_token(ours, prompt, options.tokens))
    found = {
        "threads": options.threads,
        "open": round(opened, 2),
        "first": round(first, 2),
        "resident": added,
        "file": measure.total_bytes(output.glob("*.safetensors")),
        "seconds": {"bf16": round(median(of_theirs), 4), "int4": round(median(of_ours), 4)},
        "speed": round(median(of_theirs) / median(of_ours), 2),
    }
    print(json.dumps(measure.conditions() | found))


if __name__ == "__main__":
    main()
