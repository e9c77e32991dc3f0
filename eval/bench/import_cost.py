"""What help, a mistyped command and `import grokquant` cost, against the imports they cannot avoid.

    python eval/bench/import_cost.py [--rounds N]

Every round starts each program once, so that a busy moment of the machine meets all of them.
Prints a JSON line each: the median over rounds, and its ratio to that of the bare import.
"""

import argparse
import json
import subprocess
import sys
from statistics import median
from time import perf_counter

from measure import GROKQUANT, conditions

PYTHON = [sys.executable, "-c"]
BARE = {name: [*PYTHON, f"import {name}"] for name in ("click", "torch")}
# Program -> the bare import that it is measured against, and its command.
PROGRAMS = {
    "--version": ("click", [*GROKQUANT, "--version"]),
    "--help": ("click", [*GROKQUANT, "--help"]),
    "quantize --help": ("click", [*GROKQUANT, "quantize", "--help"]),
    "a mistyped command": ("click", [*GROKQUANT, "quantise"]),
    "import grokquant": ("torch", [*PYTHON, "import grokquant"]),
}


def seconds(command: list[str]) -> float:
    start = perf_counter()
    subprocess.run(command, capture_output=True)  # a mistyped command fails on purpose
    return perf_counter() - start


def medians(rounds: int) -> dict[str, float]:
    """Seconds of every program and bare import."""
    commands = BARE | {what: command for what, (_, command) in PROGRAMS.items()}
    for command in commands.values():
        seconds(command)  # reads the files into the page cache and compiles modules
    taken = [{what: seconds(command) for what, command in commands.items()} for _ in range(rounds)]
    return {what: median(times[what] for times in taken) for what in commands}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    found = medians(parser.parse_args().rounds)
    for what, (bare, _) in PROGRAMS.items():
        line = {
            "bench": "import_cost",
            "what": what,
            "against": f"import {bare}",
            "seconds": found[what],
            "against_seconds": found[bare],
            "ratio": found[what] / found[bare],
        }
        print(json.dumps(line | conditions()), flush=True)


if __name__ == "__main__":
    main()
