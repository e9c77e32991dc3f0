"""Mean KLD of the toy in llama.cpp's grids: our rtn and gptq against ggml's own quantizer.

    python eval/bench/gguf_quality.py [GRID ...]

Experts and attention are quantized by all three, embeddings and head by none, as llama-quantize
does with --pure. ggml is taken from the file that GGML_LIBRARY names or from an installed llama_cpp
package; without it there is no peer. All results are read and evaluated by the same code. Prints a
JSON line per grid and quantizer.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from ggml import ggml_library, quantizer

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.files.gguf_header import GgufTensor, read_tensors
from grokquant.grids import GRIDS

NAMES = [name for name, grid in GRIDS.items() if grid.ggml_type is not None]


def quantize(rule: dict, output: Path) -> Path:
    """All matrices of the toy as `rule` says, in one GGUF file."""
    return grokquant.quantize(
        {
            "model": {"path": "toy"},
            "calibration": {"samples": 128, "length": 256},
            "quantize": [{"match": "*", **rule}],
            "output": {"path": str(output), "format": "gguf"},
        }
    )


def by_ggml(library: Path, dense: Path, ours: Path, grid: str, output: Path) -> Path:
    """`ours`, its blocks replaced by those that ggml makes of the same tensors of `dense`."""
    shutil.copytree(ours, output)
    source, target = (next(place.glob("*.gguf")) for place in (dense, output))
    stored = {tensor.name: tensor for tensor in read_tensors(source)}
    quantize = quantizer(library)
    with target.open("r+b") as file:
        for tensor in read_tensors(target):
            if tensor.type != grid.upper():
                continue
            W = weights(source, stored[tensor.name])
            blocks = np.empty(tensor.bytes, np.uint8)
            columns = tensor.shape[-1]
            rows = W.numel() // columns
            addresses = (W.data_ptr(), blocks.ctypes.data)
            quantize(GRIDS[grid].ggml_type, *addresses, 0, rows, columns, None)
            file.seek(tensor.offset)
            file.write(blocks.tobytes())
    return output


def weights(path: Path, tensor: GgufTensor) -> torch.Tensor:
    """A bfloat16 tensor of a file in float32."""
    raw = np.fromfile(path, np.int16, tensor.bytes // 2, offset=tensor.offset)
    return torch.from_numpy(raw).view(torch.bfloat16).float()


def weight_error(output: Path) -> float:
    """||W - Q|| / ||W|| over all quantized matrices."""
    stored, found = dict(open_checkpoint("toy").units()), dict(open_checkpoint(output).units())
    lost = total = 0.0
    for name, ref in stored.items():
        W = ref.read().double()
        lost += (W - found[name].read().double()).square().sum().item()
        total += W.square().sum().item()
    return (lost / total) ** 0.5


def outputs(library: Path | None, grid: str, directory: Path) -> Iterator[tuple[str, Path]]:
    rtn = quantize({"method": "rtn", "grid": grid}, directory / f"{grid}-rtn")
    if library:
        dense = directory / "dense"
        dense = dense if dense.exists() else quantize({"method": "unquantized"}, dense)
        yield "llama.cpp", by_ggml(library, dense, rtn, grid, directory / f"{grid}-peer")
    yield "rtn", rtn
    yield "gptq", quantize({"method": "gptq", "grid": grid}, directory / f"{grid}-gptq")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("grids", nargs="*", default=NAMES)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for grid in given.grids:
            for quantizer, output in outputs(ggml_library(), grid, Path(directory)):
                report = grokquant.evaluate(
                    output, "toy", samples=128, length=256, quick=True, cache=f"{directory}/cache"
                )
                figures = {
                    "bench": "gguf_quality",
                    "grid": grid,
                    "quantizer": quantizer,
                    "kld": report.kld.mean.value,
                    "kld_error": report.kld.mean.error,
                    "ppl_ratio": report.perplexity.ratio.value,
                    "same_top_p": report.same_top_p.value,
                    "weight_error": weight_error(output),
                }
                print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
