"""A matrix of Grok-1 that stays packed, multiplied with a few and with many tokens, against bf16.

    python eval/bench/packed.py [--rows N] [--columns N] [--repeats N] [--tokens 1,8,128,512]
                                [--busy]

Random codes and scales [rows, columns] on each grid; the matrix is held as `grokquant.load` holds
it. Figures are milliseconds, medians of runs in turn, and `speed` is bf16's time (torch's product
with the dense matrix) over that of the packed one. `held` is the memory of the packed matrix over
the bytes of its file, `first_use` the milliseconds that reading and converting it takes. With
`--busy` they are the CPU time of one thread, which other work on the machine changes least. Prints
one JSON line.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import measure
import torch
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


def random_matrix(rows: int, columns: int, scheme: Scheme) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(ROUNDED, columns, generator=generator).mul_(0.02)
    return QTensor.cat([quantize_rtn(W, scheme, "absmax")] * (rows // ROUNDED))


def packed_matrix(rows: int, columns: int, name: str) -> PackedMatrix:
    """The matrix as a file of its format gives it, opened but not yet read."""
    scheme, format_name = CASES[name]
    format = FORMATS[format_name]
    parts = format.pack("x.weight", random_matrix(rows, columns, scheme))
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
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return 1000 * (clock() - start)


def compare(dense: Tensor, packed: PackedMatrix, tokens: int, repeats: int) -> dict:
    """Medians of both, run in turn."""
    x = torch.randn(tokens, dense.shape[1], dtype=torch.bfloat16)
    of_dense = []
    of_packed = []
    for _ in range(repeats):
        of_dense.append(milliseconds(lambda: x @ dense.T))
        of_packed.append(milliseconds(lambda: packed.product(x)))
    bf16 = median(of_dense)
    ours = median(of_packed)
    return {"bf16": round(bf16, 2), "packed": round(ours, 2), "speed": round(bf16 / ours, 2)}


def measured(dense: Tensor, name: str, options: argparse.Namespace) -> dict:
    packed = packed_matrix(*dense.shape, name)
    one = torch.randn(1, dense.shape[1], dtype=torch.bfloat16)
    first_use = milliseconds(lambda: packed.product(one))
    tokens = [int(count) for count in options.tokens.split(",")]
    return {
        "first_use": round(first_use),
        "held": round(packed.cache.nbytes / packed.ref.stored_bytes, 3),
    } | {str(count): compare(dense, packed, count, options.repeats) for count in tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--columns", type=int, default=6144)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", default="1,8,128,512")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--busy", action="store_true")
    options = parser.parse_args()
    if options.busy:
        torch.set_num_threads(1)
    dense = torch.randn(options.rows, options.columns).mul_(0.02).bfloat16()
    found = {name: measured(dense, name, options) for name in options.cases.split(",")}
    print(json.dumps(measure.conditions() | {"milliseconds": found}))


if __name__ == "__main__":
    main()
