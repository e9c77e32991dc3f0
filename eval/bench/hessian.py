"""The Hessian of bfloat16 activations: seconds against a float32 `X.T @ X` in the same run.

    python eval/bench/hessian.py [--tokens N] [--features N] [--repeats N]

The float32 product is given its inputs in float32; ours starts from bfloat16. Errors are the
largest of 64 columns against float64, as a share of the largest entry. Prints one JSON line.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from grokquant.calibration import gram_kernels
from grokquant.calibration.hessian import accumulate

COLUMNS = 64


def seconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--features", type=int, default=6144)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    X = torch.randn(options.tokens, options.features)
    X = (X * torch.exp(torch.randn(options.features))).bfloat16()
    wide = X.float()

    def ours() -> Tensor:
        return accumulate([X], options.features).H

    def plain() -> Tensor:
        return wide.T @ wide

    exact = X.double().T @ X[:, :COLUMNS].double()
    errors = [
        ((H()[:, :COLUMNS] - exact).abs().max() / exact.abs().max()).item() for H in (ours, plain)
    ]
    turns = [(seconds(ours), seconds(plain)) for _ in range(options.repeats)]
    ours_seconds, plain_seconds = (median(turn) for turn in zip(*turns, strict=True))
    print(
        json.dumps(
            {
                "bench": "hessian",
                "shape": [options.tokens, options.features],
                "seconds": ours_seconds,
                "float32_seconds": plain_seconds,
                "ratio": median(plain / ours for ours, plain in turns),
                "error": errors[0],
                "float32_error": errors[1],
                "bf16_instructions": gram_kernels.instructions(),
                "repeats": options.repeats,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "cpu": platform.processor() or platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
