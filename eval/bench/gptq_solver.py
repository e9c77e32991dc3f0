"""GPTQ of one matrix, its Hessian given: seconds against llm-compressor's solver in the same run.

    python eval/bench/gptq_solver.py [--peer-python PATH] [--rows N] [--columns N] [--repeats N]

Both round onto the same int4 grid (group 128, symmetric, scales of the largest weight), with static
activation order. Ours finds the scales and the output error within its time, the peer is given the
scales. `--peer-python` is an interpreter that can import llmcompressor; without it the peer's
figures are null. Integers are compared with a float64 transcription of the paper's algorithm on 64
rows: a row may differ from where rounding is a tie, and `tie_distance` says how far from one half
the first different integer of a row was at most. Prints one JSON line.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods.gptq import factorize, round_gptq
from grokquant.types import QTensor

SCHEME = Scheme(4, 128, scale_dtype="float32")
DAMPING = 0.01
CHECKED_ROWS = 64
PEER = """
import sys, time, torch
answers, sys.stdout = sys.stdout, sys.stderr  # imports and loggers may print
from importlib.metadata import version
from safetensors.torch import load_file, save_file
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
torch.set_num_threads(int(sys.argv[2]))
given = load_file(sys.argv[1] + "/given.safetensors")
args = QuantizationArgs(num_bits=4, strategy="group", group_size=128, actorder="static")
print(version("llmcompressor"), file=answers, flush=True)
for _ in sys.stdin:
    W, H, scale = (given[name].clone()[None] for name in ("W", "H", "scale"))
    start = time.perf_counter()
    Q, _, fallback = quantize_weight(
        W, H, scale, torch.zeros_like(scale, dtype=torch.int8), None, args, percdamp=DAMPING)
    seconds = time.perf_counter() - start
    assert not fallback.any()
    save_file({"Q": Q[0].contiguous()}, sys.argv[1] + "/peer.safetensors")
    print(seconds, file=answers, flush=True)
""".replace("DAMPING", str(DAMPING))


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weights with heavy tails and the Hessian of correlated inputs, a few features loud."""
    torch.manual_seed(0)
    W = torch.randn(rows, columns) / torch.rand(rows, columns).add_(0.2).sqrt_()
    W *= torch.rand(rows, 1) + 0.5
    X = torch.randn(2 * columns, columns)
    X += torch.randn(2 * columns, 64) @ torch.randn(64, columns)
    X *= torch.exp(torch.randn(columns))
    return W, (X.T @ X).div_(len(X))


def ours(W: Tensor, H: Tensor) -> tuple[QTensor, dict[str, float]]:
    blocks = [H.clone()]
    start = time.perf_counter()
    feedback = factorize(blocks, DAMPING, act_order=True)
    factorized = time.perf_counter()
    quantized = round_gptq(W, feedback, SCHEME, "absmax").quantized
    end = time.perf_counter()
    return quantized, {
        "factorize": factorized - start,
        "round": end - factorized,
        "total": end - start,
    }


class Peer:
    """llm-compressor's solver in its own interpreter, which waits between two turns."""

    def __init__(self, python: str, given: dict[str, Tensor], directory: str) -> None:
        self.directory = Path(directory)
        save_file(given, self.directory / "given.safetensors")
        command = [python, "-c", PEER, directory, str(torch.get_num_threads())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._line()

    def _line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        if not line:
            sys.exit("the peer's interpreter ended early")
        return line

    def turn(self) -> float:
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._line())

    def end(self) -> Tensor:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        return load_file(self.directory / "peer.safetensors")["Q"]


def proxy_loss(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) of E = W - Q."""
    lost, total = (((M @ H) * M).sum().item() for M in (W - Q, W))
    return lost / total


def naive(W: Tensor, H: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the paper's algorithm 1 in float64, what was rounded, and the order of visits."""
    scales = scales.double().repeat_interleave(W.shape[1] // scales.shape[1], 1)
    order = H.diagonal().argsort(descending=True, stable=True)
    H = H.double() + DAMPING * H.diagonal().mean().item() * torch.eye(len(H))
    upper = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order]), upper=True)
    W, scales = W.double()[:, order], scales[:, order]
    rounded = torch.empty_like(W)
    for i in range(W.shape[1]):
        rounded[:, i] = W[:, i] / scales[:, i]
        code = rounded[:, i].round().clamp(SCHEME.qmin, SCHEME.qmax)
        error = (W[:, i] - code * scales[:, i]) / upper[i, i]
        W[:, i:] -= error[:, None] * upper[i, i:]
    return rounded.round().clamp(SCHEME.qmin, SCHEME.qmax), rounded, order


def compared_with_naive(W: Tensor, H: Tensor, quantized: QTensor) -> dict[str, float]:
    rows = slice(CHECKED_ROWS)
    codes, rounded, order = naive(W[rows], H, quantized.scales[rows])
    different = quantized.codes[rows][:, order] != codes
    firsts = [(row, int(line.nonzero()[0])) for row, line in enumerate(different) if line.any()]
    from_tie = [abs(abs(rounded[at] - rounded[at].floor()).item() - 0.5) for at in firsts]
    return {
        "rows": len(codes),
        "rows_with_a_difference": len(firsts),
        "equal_integers": 1 - different.double().mean().item(),
        "tie_distance": max(from_tie, default=0.0),
    }


def matmul_rate() -> float:
    """Floating-point operations per second of a float32 matrix product."""
    A = torch.randn(4096, 4096)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        A @ A
        seconds.append(time.perf_counter() - start)
    return 2 * 4096**3 / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer-python")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=6144)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    W, H = problem(options.rows, options.columns)
    quantized, _ = ours(W, H)  # compiles
    with tempfile.TemporaryDirectory() as directory:
        given = {"W": W, "H": H, "scale": quantized.scales}
        peer = Peer(options.peer_python, given, directory) if options.peer_python else None
        turns = [(ours(W, H)[1], peer.turn() if peer else None) for _ in range(options.repeats)]
        peer_Q = peer.end() if peer else None
    seconds = {name: median(turn[name] for turn, _ in turns) for name in turns[0][0]}
    peer_seconds = median(turn for _, turn in turns) if peer else None
    operations = options.columns**3 / 3 + options.rows * options.columns**2
    print(
        json.dumps(
            {
                "bench": "gptq_solver",
                "shape": [options.rows, options.columns],
                "scheme": str(SCHEME),
                "seconds": seconds,
                "peer_seconds": peer_seconds,
                "ratio": peer_seconds / seconds["total"] if peer_seconds else None,
                "limit_seconds": operations / matmul_rate(),
                "proxy_loss": proxy_loss(W, quantized.dequantize(), H),
                "peer_proxy_loss": proxy_loss(W, peer_Q, H) if peer_Q is not None else None,
                "naive": compared_with_naive(W, H, quantized),
                "repeats": options.repeats,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "llmcompressor": peer.version if peer else None,
                "cpu": platform.processor() or platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
