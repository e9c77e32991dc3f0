"""Rounding and packing of llama.cpp's grids without calibration, against ggml on one thread.

    python eval/bench/llama_cpp_grids.py [--rows N] [--columns N] [--repeats N] [--grids NAME ..]

Both make the blocks of the same random float32 weights. ggml is taken from the file that
GGML_LIBRARY names or from an installed llama_cpp package; without it its figures are null. It gets
no importance of columns, and in a second run one, as llama-quantize does with `--imatrix`. We
search scales (`mse`), or take those of the largest weights (`absmax`). Figures are millions of
weights a second of CPU time, medians of runs in turn, and ratios of ours to ggml's. Errors are sums
of squares over those of the weights. Prints one JSON line for each grid.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import measure
import numpy as np
import torch
from ggml import ggml_library, quantizer
from gguf import GGMLQuantizationType, quants

from grokquant.formats.gguf import FORMAT
from grokquant.grids import GRIDS, Grid
from grokquant.methods import compiled
from grokquant.methods.rtn import RTN, ScaleSettings
from grokquant.methods.scales import ScaleRule
from grokquant.threads import slices

NAMES = [name for name, grid in GRIDS.items() if grid.ggml_type is not None]


def ours(W: torch.Tensor, grid: Grid, rule: ScaleRule) -> Callable[[], np.ndarray]:
    rows, columns = W.shape
    layout = FORMAT.packed_layout("w", (rows, columns), grid.scheme)
    parts = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in layout.items()}

    def run() -> np.ndarray:
        for part in slices(0, rows, compiled.tile_rows(columns)):
            quantized, _ = RTN.round_tile(W[part], grid.scheme, ScaleSettings(rule))
            FORMAT.pack_into(parts, "w", part, quantized)
        (blocks,) = parts.values()
        return blocks.numpy()

    return run


def ggml(
    library: Path, W: np.ndarray, grid: Grid, importance: np.ndarray | None
) -> Callable[[], np.ndarray]:
    quantize = quantizer(library)
    rows, columns = W.shape
    blocks = np.zeros((rows, columns // grid.block_columns * grid.block_bytes), np.uint8)
    given = None if importance is None else importance.ctypes.data

    def run() -> np.ndarray:
        kind = grid.ggml_type
        quantize(kind, W.ctypes.data, blocks.ctypes.data, 0, rows, columns, given)
        return blocks

    return run


def figures(name: str, W: np.ndarray, repeats: int) -> dict:
    grid = GRIDS[name]
    runs = {
        "mse": ours(torch.from_numpy(W), grid, "mse"),
        "absmax": ours(torch.from_numpy(W), grid, "absmax"),
    }
    if library := ggml_library():
        ones = np.ones(W.shape[1], np.float32)
        runs["ggml"] = ggml(library, W, grid, None)
        runs["ggml_imatrix"] = ggml(library, W, grid, ones)
    errors = {}
    for label, run in runs.items():
        values = quants.dequantize(run(), GGMLQuantizationType[name.upper()])
        errors[label] = float(np.square(values - W).sum() / np.square(W).sum())
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(repeats):
        for label, run in runs.items():
            start = time.thread_time()
            run()
            seconds[label].append(time.thread_time() - start)
    speeds = {label: W.size / median(found) / 1e6 for label, found in seconds.items()}
    peer = speeds.get("ggml")
    imatrix = speeds.get("ggml_imatrix")
    return {
        "bench": "llama_cpp_grids",
        "grid": name,
        "million_weights_per_second": {"ggml": None, "ggml_imatrix": None} | speeds,
        "ratio_to_ggml": peer and speeds["mse"] / peer,
        "ratio_to_ggml_imatrix": imatrix and speeds["mse"] / imatrix,
        "absmax_ratio_to_ggml": peer and speeds["absmax"] / peer,
        "squared_errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=6144)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--grids", nargs="*", default=NAMES, choices=NAMES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = (given.rows, given.columns)
    W = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
    library = ggml_library()
    for name in given.grids:
        line = figures(name, W, given.repeats) | measure.conditions()
        line["versions"]["ggml"] = library and library.resolve().name
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
