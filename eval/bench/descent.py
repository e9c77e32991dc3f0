"""Coordinate descent after GPTQ, on parts of an expert of Grok-1's shape: seconds and objectives.

    python eval/bench/descent.py [--case NAME] [--rows N] [--columns N] [--hidden N] [--bits N]
                                 [--sweeps N ..]

Gate and up, --rows of their 65536 rows, with a metric of blocks of 16 rows; down, --columns of its
32768 columns, with a metric of all its rows. Inputs are correlated, as in `gptq_expert.py`, and so
are outputs. Descent runs one-sided, 2 sweeps, and from there two-sided for each number of --sweeps.
Objectives are shares of GPTQ's: `one_sided` is tr(E H E^T), `two_sided` tr(G E H E^T). Prints a
JSON line for each case; the CPU seconds are the process's, which other processes change less.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from gptq_expert import activations, peak_rss, weights
from measure import conditions
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods.descent import descend
from grokquant.methods.gptq import factorize, round_gptq
from grokquant.types import QTensor

T = TypeVar("T")
# One-sided rounding loses by much damping of the inputs, two-sided rounding gains by it.
DAMPING, INPUT_DAMPING, OUTPUT_DAMPING = 0.01, 0.5, 0.1
BLOCK, INNER, ROWS_AT_ONCE = 16, 2, 2048


def timed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """A result, the seconds that it took, and those of all CPUs together."""
    start = time.perf_counter(), time.process_time()
    result = work()
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return result, {"seconds": round(seconds[0], 2), "cpu_seconds": round(seconds[1], 2)}


def damped(gram: Tensor, damping: float) -> Tensor:
    """Square matrices [.., n, n] with a share of their mean diagonal added."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    return gram + damping * mean[..., None, None] * torch.eye(gram.shape[-1])


def objective(W: Tensor, quantized: QTensor, H: Tensor, metric: Tensor | None) -> float:
    """tr(G E H E^T)."""
    E = torch.cat([part.dequantize().float() - w for part, w in parts(quantized, W)])
    EH = E @ H
    if metric is not None:
        E = torch.bmm(metric, E.unflatten(0, metric.shape[:2])).flatten(0, 1)
    return EH.mul_(E).sum(dtype=torch.float64).item()


def parts(quantized: QTensor, W: Tensor) -> Iterator[tuple[QTensor, Tensor]]:
    for first in range(0, len(W), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        yield quantized.rows(rows), W[rows]


def measure(case: str, W: Tensor, metric: Tensor, scheme: Scheme, sweeps: list[int]) -> dict:
    X = activations(2 * W.shape[1], W.shape[1]).float()
    gram = X.T @ X
    del X
    H = damped(gram, DAMPING)
    feedback = factorize(gram, DAMPING, act_order=True)
    start, seconds = timed(lambda: round_gptq(W, feedback, scheme).quantized)
    result: dict = {"bench": "descent", "case": case, "shape": list(W.shape), "scheme": str(scheme)}
    result |= {"metric": list(metric.shape), "gptq": seconds}
    wide = damped(gram, INPUT_DAMPING)

    def note(name: str, quantized: QTensor, seconds: dict[str, float]) -> None:
        # Rounded seconds of a small case may be 0.
        ratio = seconds["cpu_seconds"] / max(result["gptq"]["cpu_seconds"], 0.01)
        found = {"one_sided": (H, None), "two_sided": (wide, metric)}
        shares = {
            side: round(objective(W, quantized, *sides) / objective(W, start, *sides), 4)
            for side, sides in found.items()
        }
        result[name] = seconds | {"cpu_ratio": round(ratio, 2)} | shares

    one, seconds = timed(partial(descend, start, W, H, None, 2, INNER))
    note("one_sided", one, seconds)
    for count in sweeps:
        two, seconds = timed(partial(descend, one, W, wide, metric, count, INNER))
        note(f"two_sided_{count}", two, seconds)
    return result


def correlated(blocks: int, size: int) -> Tensor:
    """Damped covariances of outputs, float32 [blocks, size, size]."""
    made = []
    for _ in range(blocks):
        outputs = torch.randn(2 * size, size) + torch.randn(2 * size, 8) @ torch.randn(8, size)
        made.append(outputs.T @ outputs / len(outputs))
    return damped(torch.stack(made), OUTPUT_DAMPING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--case", choices=("gate_up", "down"), nargs="+", default=["gate_up", "down"]
    )
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=6144)
    parser.add_argument("--sweeps", type=int, nargs="+", default=[6])
    parser.add_argument("--bits", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    cases = {
        "gate_up": (options.rows, options.hidden, options.rows // BLOCK, BLOCK),
        "down": (options.hidden, options.columns, 1, options.hidden),
    }
    for case in options.case:
        rows, columns, blocks, size = cases[case]
        W = weights(rows, columns, 0).float()
        scheme = Scheme(options.bits, 128)
        result = measure(case, W, correlated(blocks, size), scheme, options.sweeps)
        result |= {"peak_rss": peak_rss(), "threads": torch.get_num_threads()}
        print(json.dumps(result | conditions()), flush=True)


if __name__ == "__main__":
    main()
