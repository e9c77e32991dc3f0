"""rtn and copy of one matrix of Grok-1 in memory, against ggml's Q4_0 and torch, on all cores.

    python eval/bench/rtn_kernel.py [--rows N] [--columns N] [--repeats N] [--compile]

The matrix lies as in the release (int8 by columns, a bfloat16 scale for each eighth of a row) and
becomes packed int4 of groups of 128, scales of the largest weight or searched ("mse"); copy keeps
the int8. ggml quantizes the same weights in float32 on as many threads. It is taken from the file
that GGML_LIBRARY names or from an installed llama_cpp package; without it its figures are null.
Figures are GB/s where a weight counts 2 bytes, medians of runs in turn. Prints one JSON line.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median

import measure
import numpy as np
import torch
from ggml import ggml_library, quantizer
from torch import Tensor

from grokquant.formats.compressed_tensors import FORMAT
from grokquant.grids import Scheme
from grokquant.job.fused import round_and_pack
from grokquant.methods.method import NoSettings
from grokquant.methods.rtn import ScaleSettings, quantize_with_torch
from grokquant.methods.scales import ScaleRule
from grokquant.types import Matrix, QTensor, Unit

INT4, INT8 = Scheme(4, 128), Scheme(8, 128)
GROUPS = 8  # in a row of the release
TORCH_ROWS = 256  # a tile that stays in the cache
GGML_Q4_0, Q4_0_BLOCK, Q4_0_BYTES = 2, 32, 18
Run = Callable[[], object]


def release_matrix(rows: int, columns: int) -> QTensor:
    """Random weights [rows, columns], int8 stored by columns."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.empty(columns, rows, dtype=torch.int8)
    for line in codes.split(256):
        line.copy_(torch.randn(line.shape, generator=generator).mul_(30).clamp_(-127, 127))
    scales = torch.rand(GROUPS, rows, generator=generator).add_(0.5).mul_(1e-3).bfloat16()
    return QTensor(codes.T, scales.T, Scheme(8, columns // GROUPS))


def unit_of(stored: QTensor, method: str, scheme: Scheme, rule: ScaleRule) -> Unit:
    settings = ScaleSettings(rule) if method == "rtn" else NoSettings()
    place = Matrix("w", "w", layer=0, part="w", reads="w")
    shape = (stored.codes.shape[0], stored.codes.shape[1])
    return Unit(**vars(place), shape=shape, scheme=scheme, method=method, settings=settings, rule=0)


def ours(stored: QTensor, method: str, scheme: Scheme, rule: ScaleRule) -> Run:
    unit = unit_of(stored, method, scheme, rule)
    parts, _ = round_and_pack(unit, stored, FORMAT)
    return lambda: round_and_pack(unit, stored, FORMAT, parts)


def torch_eager(stored: QTensor) -> Run:
    """The reference in tiles; torch threads each operation."""
    parts, _ = round_and_pack(unit_of(stored, "rtn", INT4, "absmax"), stored, FORMAT)

    def run() -> None:
        for start in range(0, len(stored.codes), TORCH_ROWS):
            rows = slice(start, start + TORCH_ROWS)
            tile = quantize_with_torch(stored.rows(rows), INT4, "absmax")
            FORMAT.pack_into(parts, "w", rows, tile)

    return run


def torch_compiled(stored: QTensor) -> Run:
    """int4 by the largest weight, as one function that torch fuses, on the same tiles."""

    def tile(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        weights = (codes.unflatten(1, (GROUPS, -1)).bfloat16() * scales.unsqueeze(-1)).flatten(1)
        groups = weights.float().unflatten(1, (-1, 128))
        new_scales = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16()
        new_codes = torch.round(groups / new_scales.float()).clamp(-8, 7).flatten(1).to(torch.int8)
        nibbles = (new_codes + 8).view(torch.uint8)
        return nibbles[:, ::2] | (nibbles[:, 1::2] << 4), new_scales

    fused = torch.compile(tile, dynamic=False)
    packed = torch.empty(stored.codes.shape[0], stored.codes.shape[1] // 2, dtype=torch.uint8)

    def run() -> None:
        for start in range(0, len(packed), TORCH_ROWS):
            rows = stored.rows(slice(start, start + TORCH_ROWS))
            packed[start : start + TORCH_ROWS] = fused(rows.codes, rows.scales)[0]

    return run


def ggml_q4_0(library: Path, stored: QTensor) -> Run:
    quantize = quantizer(library)
    rows, columns = stored.codes.shape
    W, threads = np.empty((rows, columns), np.float32), torch.get_num_threads()
    for start in range(0, rows, TORCH_ROWS):
        part = slice(start, start + TORCH_ROWS)
        W[part] = stored.rows(part).dequantize().float().numpy()
    packed = np.zeros(W.size // Q4_0_BLOCK * Q4_0_BYTES, np.uint8)
    edges = [rows * index // threads for index in range(threads + 1)]

    def work(first: int, last: int) -> None:
        quantize(
            GGML_Q4_0,
            W.ctypes.data,
            packed.ctypes.data,
            first * columns,
            last - first,
            columns,
            None,
        )

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, edges, edges[1:]))

    return run


def gigabytes_per_second(runs: dict[str, Run], weights: int, repeats: int) -> dict[str, float]:
    """Medians of `repeats` runs of each in turn, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: 2 * weights / median(found[1:]) / 1e9 for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--columns", type=int, default=6144)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too; needs a compiler"
    )
    given = parser.parse_args()
    stored, library = release_matrix(given.rows, given.columns), ggml_library()
    runs = {
        "absmax": ours(stored, "rtn", INT4, "absmax"),
        "mse": ours(stored, "rtn", INT4, "mse"),
        "copy": ours(stored, "copy", INT8, "absmax"),
        "torch_eager": torch_eager(stored),
    }
    if given.compile:
        runs["torch_compile"] = torch_compiled(stored)
    if library:
        runs["ggml_q4_0"] = ggml_q4_0(library, stored)
    speeds = gigabytes_per_second(runs, given.rows * given.columns, given.repeats)
    peer = speeds.get("ggml_q4_0")
    figures = {
        "bench": "rtn_kernel",
        "rows": given.rows,
        "columns": given.columns,
        "threads": torch.get_num_threads(),
        "gb_per_second": {"torch_compile": None, "ggml_q4_0": None} | speeds,
        "absmax_ratio_to_ggml": peer and speeds["absmax"] / peer,
    } | measure.conditions()
    figures["versions"] |= {"numba": version("numba"), "ggml": library and library.resolve().name}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
