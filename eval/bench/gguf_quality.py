"""Mean KLD of the toy in llama.cpp's grids: our rtn and gptq against llama.cpp's own quantizer.

    python eval/bench/gguf_quality.py --llama-cpp PYTHON [GRID ...]

Experts and attention are quantized by all three, embeddings and head by none. PYTHON has
llama-cpp-python; without it there is no peer. All are read and evaluated by the same code. Prints a
JSON line per grid and quantizer.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grokquant
from grokquant.checkpoint import open_checkpoint

# llama.cpp's numbers of files (llama_ftype) that are of one type throughout.
FILE_TYPES = {
    "q8_0": 7,
    "q6_k": 18,
    "q5_k": 16,
    "q4_1": 3,
    "q4_k": 14,
    "q4_0": 2,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "q3_k": 11,
    "q2_k": 10,
}
BF16 = 30  # the type of embeddings and head
PROGRAM = """
import sys, llama_cpp
source, target, kind, kept = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.pure = int(kind), True
params.token_embedding_type = params.output_tensor_type = int(kept)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), params))
"""


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


def by_llama_cpp(python: Path, dense: Path, ours: Path, grid: str, output: Path) -> Path:
    """`ours`, its file replaced by what llama.cpp makes of the dense one."""
    shutil.copytree(ours, output)
    (output / "model.gguf").unlink()
    files = [str(directory / "model.gguf") for directory in (dense, output)]
    command = [python, "-c", PROGRAM, *files, str(FILE_TYPES[grid]), str(BF16)]
    subprocess.run(command, check=True, capture_output=True)
    return output


def weight_error(output: Path) -> float:
    """||W - Q|| / ||W|| over all quantized matrices."""
    stored, found = dict(open_checkpoint("toy").units()), dict(open_checkpoint(output).units())
    lost = total = 0.0
    for name, ref in stored.items():
        W = ref.read().double()
        lost += (W - found[name].read().double()).square().sum().item()
        total += W.square().sum().item()
    return (lost / total) ** 0.5


def outputs(python: Path | None, grid: str, directory: Path) -> Iterator[tuple[str, Path]]:
    rtn = quantize({"method": "rtn", "grid": grid}, directory / f"{grid}-rtn")
    if python:
        dense = directory / "dense"
        dense = dense if dense.exists() else quantize({"method": "keep"}, dense)
        yield "llama.cpp", by_llama_cpp(python, dense, rtn, grid, directory / f"{grid}-peer")
    yield "rtn", rtn
    yield "gptq", quantize({"method": "gptq", "grid": grid}, directory / f"{grid}-gptq")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("grids", nargs="*", default=list(FILE_TYPES))
    parser.add_argument("--llama-cpp", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for grid in given.grids:
            for quantizer, output in outputs(given.llama_cpp, grid, Path(directory)):
                report = grokquant.evaluate(output, "toy", samples=128, length=256)
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
