"""What `grokquant plan` foretells against what the run then does: bytes, memory, time.

    python eval/bench/planning.py [--release DIR] [--work DIR]

The embedded toy by gptq and by copy; with a release of Grok-1's true shapes also that, to int4.
Prints a JSON line each: ratios of plan to run, 1 is perfect.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import measure
from measure import GROKQUANT
from real_layer import quantize_command

RECIPES = Path(__file__).parents[2] / "recipes"


def figures(what: str, command: list[str], output: Path) -> dict:
    """`command` quantizes to `output`; the same with `plan` in place of `quantize` comes first."""
    planning = [*GROKQUANT, "plan", *command[len(GROKQUANT) + 1 :], "--json"]
    plan = json.loads(measure.run(planning).stdout)
    run = measure.run([*command, "--json"])
    report = json.loads(run.stdout)
    written = {file.name: file.stat().st_size for file in output.glob("*.safetensors")}
    shutil.rmtree(output)
    return {
        "bench": "planning",
        "what": what,
        "bytes_exact": plan["files"] == written and plan["output_bytes"] == sum(written.values()),
        "output_bytes": plan["output_bytes"],
        "planned_peak": plan["peak_bytes"],
        "peak_rss": run.peak_rss,
        "peak_ratio": plan["peak_bytes"] / run.peak_rss,
        "planned_seconds": plan["seconds"],
        "seconds": report["seconds"],
        "seconds_ratio": plan["seconds"] / report["seconds"],
    } | measure.conditions()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--release", type=Path)
    parser.add_argument("--work", type=Path, help="for what is made; default a temporary place")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        output = Path(work, "output")
        runs = {}
        for name in ("toy-int4", "toy-int8"):
            recipe = str(RECIPES / f"{name}.yaml")
            runs[name] = [*GROKQUANT, "quantize", recipe, "--set", f"output.path={output}"]
        if given.release:
            runs["real-int4-mse"] = quantize_command("int4-mse", given.release, output)
        for what, command in runs.items():
            print(json.dumps(figures(what, command, output)), flush=True)


if __name__ == "__main__":
    main()
