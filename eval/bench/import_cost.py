"""What help, a mistyped command and `import grokquant` cost, against the imports they cannot avoid.

    python eval/bench/import_cost.py [--rounds N]

Seconds are those of the processor: the programs have one thread and wait for nothing, so other work
on the machine counts little. Every round starts each program once; ratios are of one round. Prints
a JSON line each, medians over the rounds.
"""

import argparse
import json
import resource
import subprocess
import sys
from statistics import median

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
    """Processor time of a command, the system's on its behalf included."""
    before = _of_children()
    subprocess.run(command, capture_output=True)  # a mistyped command fails on purpose
    return _of_children() - before


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
