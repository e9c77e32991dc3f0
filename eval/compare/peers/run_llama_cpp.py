"""llama-quantize, experts alone: MODEL TOKENS OUTPUT GRID plain|imatrix BIN.

Runs with grokquant, which writes MODEL as GGUF in bfloat16. llama-imatrix takes text, which it cuts
itself, so it gets the text of TOKENS.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.text.tokenizer import load_tokenizer

model, tokens, output, grid, how, binaries = sys.argv[1:]


def run(program: str, *arguments: object) -> None:
    subprocess.run([Path(binaries) / program, *map(str, arguments)], check=True)


def importance(dense: Path, directory: Path) -> Path:
    """The file of llama-imatrix."""
    rows = [json.loads(line)["input_ids"] for line in Path(tokens).read_text().splitlines()]
    tokenizer = load_tokenizer(open_checkpoint(model))
    text = directory / "text.txt"
    text.write_text("".join(tokenizer.decode(row) for row in rows))
    found = directory / "imatrix.gguf"
    run("llama-imatrix", "-m", dense, "-f", text, "-o", found, "-c", len(rows[0]), "--no-ppl")
    return found


with tempfile.TemporaryDirectory() as name:
    directory = Path(name)
    recipe = {
        "model": {"path": model},
        "quantize": [{"match": "*", "method": "unquantized"}],
        "output": {"path": str(directory / "dense"), "format": "gguf"},
    }
    (dense,) = grokquant.quantize(recipe).glob("*.gguf")
    options = ["--imatrix", importance(dense, directory)] if how == "imatrix" else []
    keep = ["--token-embedding-type", "bf16", "--output-tensor-type", "bf16"]
    keep += ["--tensor-type", "attn_.*=bf16"]
    Path(output).mkdir()
    for path in (dense.parent / "config.json", *dense.parent.glob("tokenizer*")):
        shutil.copyfile(path, Path(output) / path.name)
    place = Path(output) / "model.gguf"
    run("llama-quantize", *options, "--pure", *keep, dense, place, grid.upper())
