"""What help, a mistyped command and `import grokquant` cost, against the imports they cannot avoid.

    python eval/bench/import_cost.py [--rounds N]

Every round starts each program once; ratios are of one round, so that a busy moment of the machine
meets both sides. Prints a JSON line each, medians over the rounds.
"""

import argparse
import json
import subprocess
import sys
from statistics import median
from time import perf_counter

from measure import conditions

PYTHON = [sys.executable, "-c"]
GROKQUANT = [*PYTHON, "from grokquant.cli import main; main()"]  # as the installed script does
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


def measured(rounds: int) -> list[dict[str, float]]:
    """Seconds of every program and bare import, round by round."""
    commands = BARE | {what: command for what, (_, command) in PROGRAMS.items()}
    for command in commands.values():
        seconds(command)  # reads the files into the page cache and compiles modules
    return [{what: seconds(command) for what, command in commands.items()} for _ in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = measured(parser.parse_args().rounds)
    for what, (bare, _) in PROGRAMS.items():
        line = {
            "bench": "import_cost",
            "what": what,
            "against": f"import {bare}",
            "seconds": median(taken[what] for taken in rounds),
            "against_seconds": median(taken[bare] for taken in rounds),
            "ratio": median(taken[what] / taken[bare] for taken in rounds),
            "rounds": len(rounds),
        }
        print(json.dumps(line | conditions()), flush=True)


if __name__ == "__main__":
    main()
