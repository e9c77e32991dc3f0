"""A matrix of Grok-1 that stays packed, multiplied with a few and with many tokens, against peers.

    python eval/bench/packed.py [--rows N] [--columns N] [--repeats N] [--tokens 1,8,128]
                                [--threads 1,2] [--cases NAMES]

Random weights [rows, columns] on each grid; the matrix is held as `grokquant.load` holds it. Peers
are torch's product with the dense matrix in bfloat16 and its kernels of 4 and 8 bits, bitsandbytes,
and ggml if its library is at hand (see `ggml.py`). Figures are milliseconds of CPU time a thread,
which other work on the machine changes least; threads that wait for others may count as busy. They
are medians of rounds in which all have a turn. `to_best_peer` is our time over that of the quickest
peer of as many bits or bf16, and `speed` bf16's time over ours. `held` is the memory of the packed
matrix over the bytes of its file, `first_use` the milliseconds that reading and converting it
takes. Prints one JSON line.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from statistics import median

import measure
import torch
from ggml import ggml_library
from packed_peers import Peer, peers
from torch import Tensor

from grokquant.formats import FORMATS
from grokquant.grids import GRIDS, Scheme
from grokquant.methods.rtn import quantize_rtn
from grokquant.runtime.matrix_cache import MatrixCache
from grokquant.runtime.packed import PackedMatrix
from grokquant.types import QTensor, TensorRef

CASES = {
    "int4 g128": (Scheme(4, 128), "compressed-tensors"),
    "int4 g32": (Scheme(4, 32), "compressed-tensors"),
    "int8 g128": (Scheme(8, 128), "compressed-tensors"),
    "q4_0": (GRIDS["q4_0"].scheme, "gguf"),
    "q4_k": (GRIDS["q4_k"].scheme, "gguf"),
    "q8_0": (GRIDS["q8_0"].scheme, "gguf"),
    "nf4 g64": (GRIDS["nf4"].scheme, "bitsandbytes"),
}
# Rows that are rounded; the matrix repeats them.
ROUNDED = 512
# After so many no other round begins: one of 512 tokens takes half a minute of a core.
SECONDS = 120
# Relative error of a product that 4 bits explain; a peer that is called wrongly has more.
MOST_ERROR = 0.2
Milliseconds = dict[str, float]  # by the name of a product


def random_rows(columns: int) -> Tensor:
    """float32 [ROUNDED, columns]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROUNDED, columns, generator=generator).mul_(0.02)


def rounded(rows: int, columns: int, scheme: Scheme) -> QTensor:
    W = random_rows(columns)
    return QTensor.cat([quantize_rtn(W, scheme, "absmax")] * (rows // ROUNDED))


def packed_matrix(rows: int, columns: int, name: str) -> PackedMatrix:
    """The matrix as a file of its format gives it, opened but not yet read."""
    scheme, format_name = CASES[name]
    format = FORMATS[format_name]
    parts = format.pack("x.weight", rounded(rows, columns, scheme))
    ref = TensorRef(
        name,
        (rows, columns),
        torch.bfloat16,
        sum(part.nbytes for part in parts.values()),
        lambda: format.unpack("x.weight", parts, scheme),
        scheme,
        open_rows=lambda: partial(format.unpack, "x.weight", parts, scheme),
    )
    packed = PackedMatrix(ref, format, torch.bfloat16, MatrixCache())
    packed.open(torch.device("cpu"))
    return packed


def milliseconds(run: Callable[[], object]) -> float:
    """CPU time a thread."""
    start = time.process_time()
    run()
    return 1000 * (time.process_time() - start) / torch.get_num_threads()


def prepared(packed: PackedMatrix) -> dict[str, float]:
    """What the first use of a matrix takes."""
    one = torch.randn(1, packed.shape[1], dtype=torch.bfloat16)
    first_use = milliseconds(lambda: packed.product(one))
    held = packed.cache.nbytes / packed.ref.stored_bytes
    return {"first_use": round(first_use), "held": round(held, 3)}


def check(W: Tensor, products: Iterable[Peer]) -> None:
    """Raises if a product is not that with W."""
    x = torch.randn(2, W.shape[1], dtype=torch.bfloat16)
    expected = (x @ W.T).float()
    for peer in products:
        error = float((peer.product(x).float() - expected).norm() / expected.norm())
        if not error < MOST_ERROR:
            raise ValueError(f"{peer.name}: relative error {error:.3f}")


@torch.no_grad()
def compare(products: Iterable[Peer], x: Tensor, repeats: int) -> Milliseconds:
    """Medians of rounds; the first, in which memory is touched, does not count."""
    times: dict[str, list[float]] = {peer.name: [] for peer in products}
    start = time.perf_counter()
    for number in range(1 + repeats):
        if number > 1 and time.perf_counter() - start > SECONDS:
            break
        for peer in products:
            times[peer.name].append(milliseconds(partial(peer.product, x)))
    return {name: round(median(of_one[1:]), 2) for name, of_one in times.items()}


def to_best_peer(ours: Peer, others: Iterable[Peer], times: Milliseconds) -> tuple[str, float]:
    """(the quickest peer of as many bits or of bf16, our time over its time)"""
    names = [peer.name for peer in others if peer.bits in (ours.bits, 16)]
    best = min(names, key=times.__getitem__)
    return best, round(times[ours.name] / times[best], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--columns", type=int, default=6144)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", default="1,8,128")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--cases", default=",".join(CASES))
    options = parser.parse_args()
    shape = (options.rows, options.columns)
    packed = {name: packed_matrix(*shape, name) for name in options.cases.split(",")}
    ours = [Peer(name, CASES[name][0].bits, held.product) for name, held in packed.items()]
    W = random_rows(options.columns).bfloat16().repeat(options.rows // ROUNDED, 1)
    others = list(peers(W, partial(rounded, *shape)))
    library = ggml_library()
    line = measure.conditions()
    line["versions"] |= {
        "bitsandbytes": version("bitsandbytes"),
        "ggml": library and library.resolve().name,
    }
    line["cases"] = {name: prepared(held) for name, held in packed.items()}
    check(W, ours + others)
    line["products"] = []
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        for tokens in map(int, options.tokens.split(",")):
            x = torch.randn(tokens, options.columns, dtype=torch.bfloat16)
            times = compare(ours + others, x, options.repeats)
            line["products"].append(
                {
                    "threads": threads,
                    "tokens": tokens,
                    "milliseconds": times,
                    "speed": {one.name: round(times["bf16"] / times[one.name], 2) for one in ours},
                    "to_best_peer": {one.name: to_best_peer(one, others, times) for one in ours},
                }
            )
    print(json.dumps(line))


if __name__ == "__main__":
    main()
