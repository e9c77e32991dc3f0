"""A calibrated run on several ranks: how long it takes, and what share of that is communication.

    python eval/bench/ranks.py [--ranks 1 2 4] [--hidden N] [--samples N] [--work DIR]

The work is the same for any number of ranks: a random Grok of two layers and eight experts, GPTQ
for the experts. Every rank has one thread, so more ranks than cores measure nothing. Prints a JSON
line for each number of ranks: seconds of the slowest rank, of them those in which bytes moved and
those in which a rank waited for others, CPU seconds of each rank, and bytes sent by all. Where
other programs run, only the last two tell something. Fails unless all results have the same bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
from make_release import write_random_grok

from grokquant.families.grok_model import Grok1Config
from grokquant.files.atomic import sha256

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
FFN_PER_HIDDEN = 4
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
LENGTH = 256


def recipe(model: Path, output: Path, samples: int) -> dict:
    return {
        "model": {"path": str(model)},
        "calibration": {"text": "python-docs", "samples": samples, "length": LENGTH},
        "quantize": [{"match": "layers.*.experts.*", "method": "gptq", "bits": 4, "group": 64}],
        "max_fallbacks": 1.0,
        "output": {"path": str(output), "shard": "1MB"},
    }


def work_as_member(settings: Path, results: Path) -> None:
    """One rank of a run: notes its seconds and its traffic in a file of its own."""
    from grokquant import parallel
    from grokquant.devices import CPU
    from grokquant.job import pipeline
    from grokquant.recipe import parse_recipe

    moved = 0.0
    swap = parallel.Members._swap

    def timed_swap(*arguments: object) -> object:
        nonlocal moved
        begun = time.perf_counter()
        try:
            return swap(*arguments)  # type: ignore[arg-type]
        finally:
            moved += time.perf_counter() - begun

    parallel.Members._swap = timed_swap  # type: ignore[method-assign, assignment]
    team = parallel.join(CPU, print)
    begun = time.perf_counter()
    begun_cpu = time.process_time()
    pipeline.quantize(parse_recipe(json.loads(settings.read_text())), team=team)
    figures = {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - begun_cpu,
        "exchanging": team.traffic.seconds,
        "moving": moved,
        "sent_bytes": team.traffic.sent_bytes,
    }
    (results / f"{os.environ['RANK']}.json").write_text(json.dumps(figures))


def figures(ranks: int, model: Path, samples: int, work: Path) -> dict:
    results = work / f"ranks-{ranks}"
    results.mkdir()
    settings = results / "settings"
    output = results / "output"
    settings.write_text(json.dumps(recipe(model, output, samples)))
    member = [__file__, "--member", str(settings), "--results", str(results)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*TORCHRUN, str(ranks), *member], check=True, env=environment)
    each = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    slowest = max(each, key=lambda one: one["seconds"])
    return {
        "bench": "ranks",
        "ranks": ranks,
        "seconds": slowest["seconds"],
        "moving_share": slowest["moving"] / slowest["seconds"],
        "waiting_share": (slowest["exchanging"] - slowest["moving"]) / slowest["seconds"],
        "cpu_seconds": [one["cpu_seconds"] for one in each],
        "sent_bytes": sum(one["sent_bytes"] for one in each),
        "sha256": sha256(output / "SHA256SUMS"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--work", type=Path, help="for what is made; default a temporary place")
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.member:
        work_as_member(given.member, given.results)
        return
    with tempfile.TemporaryDirectory(dir=given.work) as directory:
        work = Path(directory)
        model = work / "model"
        model.mkdir()
        sizes = {"hidden_size": given.hidden, "intermediate_size": FFN_PER_HIDDEN * given.hidden}
        config = Grok1Config(num_hidden_layers=2, vocab_size=2048, **sizes, **HEADS)
        write_random_grok(model, config)
        lines = [figures(ranks, model, given.samples, work) for ranks in given.ranks]
    for line in lines:
        line["speedup"] = lines[0]["seconds"] / line["seconds"]
        line["cpu_ratio"] = sum(line["cpu_seconds"]) / sum(lines[0]["cpu_seconds"])
        print(json.dumps(line | measure.conditions()), flush=True)
    if len({line["sha256"] for line in lines}) > 1:
        sys.exit("the bytes depend on the number of ranks")


if __name__ == "__main__":
    main()
