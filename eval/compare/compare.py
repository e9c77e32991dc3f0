"""This package and others at equal bits: one checkpoint, one calibration text, one evaluator.

    python eval/compare/compare.py MODEL WORK --text FILE [--text FILE] [--line NAME ...]
        [--seed N ...] [--peers DIR]

Each line of LINES is a grid; each of its entrants rounds the experts of MODEL onto it, in a process
of its own, once for each draw of calibration sequences. What it wrote is read by this package's
readers and evaluated on each FILE. Results, and the table as `table.md` with the plot `plot.html`,
are kept in WORK; what is there is not made again. Prints a JSON line per entrant, draw and text,
and names those that are not installed in DIR: `make peers` does that.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from subprocess import CalledProcessError, run

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # where measure is

import measure
from comparison import table

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.evaluation.report import Report, read_report
from grokquant.recipe import CalibrationSection
from grokquant.reporting.ranking import EvaluatedModel, difference
from grokquant.text.documents import calibration_rows
from grokquant.text.tokenizer import load_tokenizer
from grokquant.toy import TOY

HERE = Path(__file__).parent
# Distributions of the peers, whose environments have these names.
PEERS = {
    "gptqmodel": "gptqmodel",
    "llm-compressor": "llmcompressor",
    "auto-round": "auto-round",
    "hqq": "hqq",
    "llama-cpp": "llama-cpp-python",
}


@dataclass(frozen=True)
class Line:
    """A grid that all `entrants` round to, integers of `bits` in groups or a named one, and the
    `format` in which ours is written."""

    entrants: tuple[str, ...]
    format: str
    bits: int = 0
    group: int = 0
    grid: str = ""

    @property
    def rule(self) -> dict:
        """The grid as keys of a rule."""
        return {"grid": self.grid} if self.grid else {"bits": self.bits, "group": self.group}


# Ours, and the keys of their rule beside the grid.
OWN = {
    "grokquant-gptq": {"method": "gptq"},
    "grokquant-two-sided": {"method": "two-sided"},
    "grokquant-gradients": {"method": "two-sided", "metric": "gradients", "descent": True},
}
_INTEGERS = (*OWN, "gptqmodel", "llm-compressor", "auto-round", "hqq")
_BLOCKS = (*OWN, "llama-cpp", "llama-cpp-imatrix")
LINES = {
    "int4-g128": Line(_INTEGERS, "compressed-tensors", 4, 128),
    "int4-g32": Line(_INTEGERS, "compressed-tensors", 4, 32),
    # llm-compressor's 3 bits are packed in a way of their own, which no engine reads.
    "int3-g128": Line(tuple(e for e in _INTEGERS if e != "llm-compressor"), "gptq", 3, 128),
    "q4_k": Line(_BLOCKS, "gguf", grid="q4_k"),
    "q3_k": Line(_BLOCKS, "gguf", grid="q3_k"),
}


@dataclass(frozen=True)
class Job:
    """A comparison of `model` after a draw of calibration sequences, in the directory `work`."""

    model: str
    work: Path
    calibration: str
    peers: Path
    samples: int
    length: int
    seed: int

    @property
    def tokens(self) -> Path:
        return self.work / "tokens.jsonl"

    def write_tokens(self) -> None:
        """The calibration sequences, which every entrant gets as token numbers."""
        checkpoint = open_checkpoint(self.model)
        how = {"samples": self.samples, "length": self.length, "seed": self.seed}
        section = CalibrationSection(text=self.calibration, **how)
        rows = calibration_rows(section, load_tokenizer(checkpoint), checkpoint)
        lines = (json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows)
        self.tokens.write_text("".join(lines))


def grokquant_command(job: Job, line: Line, entrant: str, output: Path) -> list[str]:
    """Ours. The recipe is written beside the output."""
    recipe = {
        "model": {"path": job.model},
        "calibration": {
            "text": str(job.tokens),
            "samples": job.samples,
            "length": job.length,
        },
        "quantize": [{"match": "layers.*.experts.*", **OWN[entrant], **line.rule}],
        "output": {"path": str(output), "format": line.format},
    }
    path = output.with_suffix(".json")
    path.write_text(json.dumps(recipe))
    return [*measure.GROKQUANT, "quantize", str(path)]


def peer_command(job: Job, line: Line, entrant: str, output: Path) -> list[str] | None:
    """A peer's program in the environment of the peer, None if that is not installed."""
    if entrant.startswith("llama-cpp"):
        return llama_cpp_command(job, line, entrant, output)
    python = job.peers / entrant / "bin" / "python"
    if not python.exists():
        return None
    program = HERE / "peers" / f"run_{entrant.replace('-', '_')}.py"
    given = (job.model, job.tokens, output, line.bits, line.group)
    return [str(python), str(program), *map(str, given)]


def llama_cpp_command(job: Job, line: Line, entrant: str, output: Path) -> list[str] | None:
    """llama.cpp's programs, by a program that runs with this package."""
    binaries = job.peers / "llama-cpp" / "build" / "bin"
    if not (binaries / "llama-imatrix").exists():
        return None
    how = "imatrix" if entrant.endswith("imatrix") else "plain"
    program = HERE / "peers" / "run_llama_cpp.py"
    given = (job.model, job.tokens, output, line.grid, how, binaries)
    return [sys.executable, str(program), *map(str, given)]


def version_of(job: Job, entrant: str) -> str:
    if entrant in OWN:
        return grokquant.__version__
    if entrant.startswith("llama-cpp"):
        text = (HERE / "peers" / "requirements-llama-cpp.txt").read_text()
        return text.strip().rpartition("==")[2]
    python = job.peers / entrant / "bin" / "python"
    text = f"from importlib.metadata import version; print(version({PEERS[entrant]!r}))"
    done = run([python, "-c", text], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def made(job: Job, name: str, entrant: str) -> dict | None:
    """The costs of an entrant's result, which is made unless it is there; None if it cannot be."""
    line = LINES[name]
    output = job.work / f"{entrant}-{name}"
    costs = job.work / f"{entrant}-{name}.costs.json"
    if costs.exists():
        return json.loads(costs.read_text())
    command = (grokquant_command if entrant in OWN else peer_command)(job, line, entrant, output)
    if command is None:
        print(f"{name}: {entrant} is not installed", file=sys.stderr)
        return None
    shutil.rmtree(output, ignore_errors=True)
    try:
        measured = measure.run(command)
    except CalledProcessError as error:
        print(f"{name}: {entrant} failed with {error.returncode}", file=sys.stderr)
        return None
    found = {
        "seconds": measured.seconds,
        "cpu_seconds": measured.cpu_seconds,
        "peak_rss": measured.peak_rss,
        "version": version_of(job, entrant),
    }
    costs.write_text(json.dumps(found))
    return found


def evaluated(job: Job, output: Path, text: Path) -> Report:
    """The evaluation of a result on a text, which is made unless it is there."""
    path = output.with_name(f"{output.name}.{text.stem}.json")
    if path.exists():
        return read_report(path)
    report = grokquant.evaluate(
        output,
        job.model,
        text=str(text),
        samples=128,
        length=job.length,
        quick=True,
        cache=job.work.parent / "cache",
        any_reference=True,
    )
    path.write_text(report.model_dump_json(exclude_none=True))
    return report


def expert_bits(output: Path) -> float:
    """Bits in the files for each weight of the experts."""
    checkpoint = open_checkpoint(output)
    tensors = checkpoint.source.tensors
    refs = [tensors[m.tensor] for m in checkpoint.matrices() if m.expert is not None]
    return 8 * sum(ref.stored_bytes for ref in refs) / sum(prod(ref.shape) for ref in refs)


def row(job: Job, name: str, entrant: str, costs: dict, report: Report, first: Report) -> dict:
    output = job.work / f"{entrant}-{name}"
    models = (EvaluatedModel(e, output, r) for e, r in ((entrant, report), ("first", first)))
    behind = difference(*models, "kld")
    return {
        "bench": "compare",
        "model": Path(job.model).name,
        "seed": job.seed,
        "line": name,
        "entrant": entrant,
        "version": costs["version"],
        "bits_per_weight": round(expert_bits(output), 4),
        "kld": report.kld.mean.value,
        "kld_error": report.kld.mean.error,
        "kld_99": report.kld.q99_0,
        "same_top": report.same_top_p.value,
        "router_set": [layer.router_set for layer in report.layers],
        # Mean KLD minus that of the first entrant, and its 95 % interval from a paired bootstrap.
        "behind": [behind.value, behind.low, behind.high],
        "seconds": round(costs["seconds"], 1),
        "cpu_seconds": round(costs["cpu_seconds"], 1),
        "peak_rss": costs["peak_rss"],
    }


def rows(job: Job, name: str, texts: Sequence[Path]) -> Iterator[tuple[dict, Report]]:
    """A row for each entrant that there is and each text, the first entrant's first."""
    first: dict[Path, Report] = {}
    for entrant in LINES[name].entrants:
        costs = made(job, name, entrant)
        if costs is None:
            continue
        for text in texts:
            report = evaluated(job, job.work / f"{entrant}-{name}", text)
            first.setdefault(text, report)
            found = row(job, name, entrant, costs, report, first[text])
            yield found | {"text": text.name}, report


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """One for each draw, in a directory of its own that holds the calibration sequences."""
    is_path = options.model != TOY
    model = str(Path(options.model).absolute()) if is_path else TOY
    for seed in options.seed or range(3):
        work = options.work.absolute() / f"seed-{seed}"
        work.mkdir(parents=True, exist_ok=True)
        places = (model, work, options.calibration, options.peers.absolute())
        job = Job(*places, options.samples, options.length, seed)
        if not job.tokens.exists():
            job.write_tokens()
        yield job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--text",
        action="append",
        required=True,
        type=lambda path: Path(path).absolute(),
        help="a text that calibration does not use",
    )
    parser.add_argument("--calibration", default="python-docs", help="what all calibrate on")
    parser.add_argument("--line", action="append", choices=LINES)
    parser.add_argument("--seed", action="append", type=int, help="default: 0, 1 and 2")
    parser.add_argument("--peers", type=Path, default=HERE.parents[1] / ".peers")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    found: list[tuple[dict, Report]] = []
    for job in jobs(options):
        os.chdir(job.work)  # where some peers leave logs
        for name in options.line or LINES:
            for line, report in rows(job, name, options.text):
                print(json.dumps(line), flush=True)
                found.append((line, report))
    work = options.work.absolute()
    (work / "table.md").write_text(table([line for line, _ in found]))
    ranking = grokquant.compare([report for _, report in found])
    (work / "plot.html").write_text(ranking.plot("kld").html)


if __name__ == "__main__":
    main()
