"""llama.cpp itself runs our GGUF files: `make test-readers`."""

import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import grokquant
from grokquant import pipeline
from grokquant.calibration.text import load_documents, token_rows
from grokquant.checkpoint import open_checkpoint
from grokquant.recipe import parse_recipe
from grokquant.tokenizer import load_tokenizer

PYTHON = os.environ.get("GROKQUANT_READERS", "")
pytestmark = [
    pytest.mark.readers,
    pytest.mark.skipif(not PYTHON, reason="GROKQUANT_READERS names no Python with llama.cpp"),
]
EXPERTS, ATTENTION = "layers.*.experts.*", "layers.*.attention.*"
COPY = {"match": ATTENTION, "method": "copy"}


def run(tmp_path: Path, output: Path, rows: torch.Tensor) -> torch.Tensor:
    """llama.cpp's logits [rows, time, vocabulary]."""
    np.save(tmp_path / "tokens.npy", rows.numpy())
    script = Path(__file__).parent / "readers" / "read_gguf.py"
    first = min(output.glob("*.gguf"))
    files = [str(path) for path in (first, tmp_path / "tokens.npy", tmp_path / "logits.npy")]
    subprocess.run([PYTHON, str(script), *files], check=True, capture_output=True)
    return torch.from_numpy(np.load(tmp_path / "logits.npy"))


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL divergence of two sets of logits, nats."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()


def perplexity(logits: torch.Tensor, rows: torch.Tensor) -> float:
    scored = logits[:, :-1].flatten(0, 1).double()
    return math.exp(F.cross_entropy(scored, rows[:, 1:].flatten()).item())


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Held-out text of the toy [rows, time]."""
    toy = open_checkpoint("toy")
    return token_rows(load_documents("python-docs", "heldout"), load_tokenizer(toy), 8, 128, None)


@pytest.mark.parametrize(
    ("rule", "shard"),
    [
        ({"method": "keep"}, "500MB"),
        ({"method": "rtn", "grid": "q8_0"}, "2MB"),
        ({"method": "rtn", "grid": "q4_1"}, "500MB"),
        ({"method": "rtn", "grid": "q5_k"}, "500MB"),
        ({"method": "rtn", "grid": "q6_k"}, "500MB"),
        ({"method": "gptq", "grid": "q4_0"}, "500MB"),
        ({"method": "gptq", "grid": "q4_k"}, "3MB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_llama_cpp_computes_what_we_do(rows, tmp_path, rule, shard):
    values = {
        "model": {"path": "toy"},
        "calibration": {"samples": 16, "length": 128},
        "quantize": [{"match": EXPERTS} | rule, COPY],
        "output": {"path": str(tmp_path / "out"), "format": "gguf", "shard": shard},
    }
    output = pipeline.quantize(parse_recipe(values))
    theirs = run(tmp_path, output, rows)
    model, _ = grokquant.load(output, dtype=torch.float32)
    with torch.no_grad():
        ours = model(rows).logits
    assert divergence(ours, theirs) < 2e-3  # llama.cpp rounds activations to 8 bits
    assert perplexity(theirs, rows) == pytest.approx(perplexity(ours, rows), rel=0.01)
