"""GPTQ of one whole expert of Grok-1's shape: seconds of every step, and the peak of memory.

    python eval/bench/gptq_expert.py [--tokens N] [--block N] [--hidden N] [--inner N]

Gate and up [32768, 6144] share one Hessian, down [6144, 32768] has its own of what the quantized
gate and up make of the tokens: 4.29 GB, or less in diagonal blocks of --block columns. Weights have
heavy tails, activations are correlated and of uneven size. Prints one JSON line.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from grokquant.calibration import gram_kernels
from grokquant.calibration.hessian import accumulate
from grokquant.grids import Scheme
from grokquant.methods.gptq import factorize, round_gptq

SCHEME, DAMPING = Scheme(4, 128), 0.01
TOKENS_AT_ONCE, ROWS_AT_ONCE = 2048, 1024
LOUD = 64  # directions that the activations share


class Clock:
    """Seconds by step, of the clock `now`."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Adds the time of what happens inside; a step inside a step counts for itself alone."""
        start, within = self.now(), sum(self.seconds.values())
        yield
        within = sum(self.seconds.values()) - within
        spent = self.now() - start - within
        self.seconds[name] = self.seconds.get(name, 0.0) + spent


def weights(rows: int, columns: int, seed: int) -> Tensor:
    """bfloat16 [rows, columns] with heavy tails and rows of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.empty(rows, columns, dtype=torch.bfloat16)
    for part in W.split(ROWS_AT_ONCE):
        values = torch.randn(part.shape, generator=generator)
        values *= torch.exp(0.05 / 2 * values.square())
        values *= torch.exp(0.3 * torch.randn(len(part), 1, generator=generator))
        part.copy_(values * columns**-0.5)
    return W


def activations(tokens: int, features: int) -> Tensor:
    """bfloat16 [tokens, features], correlated, some features far louder than others."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(LOUD, features, generator=generator) / 4
    size = torch.exp(0.5 * torch.randn(features, generator=generator))
    X = torch.empty(tokens, features, dtype=torch.bfloat16)
    for part in X.split(TOKENS_AT_ONCE):
        values = torch.randn(part.shape, generator=generator)
        values += torch.randn(len(part), LOUD, generator=generator) @ shared
        part.copy_(values * size)
    return X


def peak_rss() -> int:
    """Bytes of physical memory that this process held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def quantize_expert(
    clock: Clock, tokens: int, hidden: int, inner: int, block: int | None
) -> dict[str, float]:
    """Quantizes gate, up and down; returns their output errors."""
    errors: dict[str, float] = {}
    with clock.step("make_inputs"):
        X = activations(tokens, hidden)
    with clock.step("hessian_gate_up"):
        blocks = accumulate(X.split(TOKENS_AT_ONCE), hidden).blocks
    with clock.step("factorize_gate_up"):
        feedback = factorize(blocks, DAMPING, act_order=True)
    dense = {}
    for seed, name in enumerate(("gate", "up")):
        with clock.step(f"make_{name}"):
            W = weights(inner, hidden, seed)
        with clock.step(f"round_{name}"):
            rounded = round_gptq(W, feedback, SCHEME)
        errors[name] = round(rounded.output_error, 5)
        dense[name] = rounded.quantized.dequantize()
        del W, rounded
    del feedback

    def hidden_units() -> Iterator[Tensor]:
        for x in X.split(TOKENS_AT_ONCE):
            with clock.step("forward"):
                gate = F.gelu(F.linear(x, dense["gate"]).float(), approximate="tanh")
                units = gate.mul_(F.linear(x, dense["up"])).bfloat16()
                del gate
            yield units

    with clock.step("hessian_down"):
        blocks = accumulate(hidden_units(), inner, block).blocks
    dense.clear()
    with clock.step("factorize_down"):
        feedback = factorize(blocks, DAMPING, act_order=True)
    with clock.step("make_down"):
        W = weights(hidden, inner, 2)
    with clock.step("round_down"):
        errors["down"] = round(round_gptq(W, feedback, SCHEME).output_error, 5)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--block", type=int)
    parser.add_argument("--hidden", type=int, default=6144)
    parser.add_argument("--inner", type=int, default=32768)
    options = parser.parse_args()
    clock = Clock()
    errors = quantize_expert(clock, options.tokens, options.hidden, options.inner, options.block)
    seconds = {name: round(spent, 2) for name, spent in clock.seconds.items()}
    made = sum(spent for name, spent in seconds.items() if name.startswith("make"))
    print(
        json.dumps(
            {
                "bench": "gptq_expert",
                "shape": [options.inner, options.hidden],
                "tokens": options.tokens,
                "block": options.block,
                "scheme": str(SCHEME),
                "seconds": seconds,
                "total_seconds": round(sum(seconds.values()) - made, 2),
                "peak_rss": peak_rss(),
                "output_error": errors,
                "bf16_instructions": gram_kernels.instructions(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "cpu": platform.processor() or platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
