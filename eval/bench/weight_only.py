"""Quantizing a layer of Grok-1's true shapes to int4 without data, against a plain copy by dd.

    python eval/bench/weight_only.py [--release DIR] [--work DIR] [--repeat 3]

Runs `grokquant quantize` on the release (made if not given) from a cold page cache, in turn with
dd reading the same source and dd writing as many bytes as the result has to the same disk. Then the
same command again, which finds its result: what it takes is the start of any run, imports and plan,
however large the model is. Prints a JSON line for each way of choosing scales: medians, their ratio
with and without the start, and where the time went.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import median

import measure
from measure import Measured
from real_layer import quantize_command, release_at


def quantize_once(rules: str, release: Path, output: Path) -> tuple[Measured, Measured, dict]:
    """A run from a cold page cache, one that finds its result, and what the first reports."""
    shutil.rmtree(output, ignore_errors=True)
    measure.drop_from_cache(measure.files_of(release))
    command = [*quantize_command(rules, release, output), "--json"]
    whole = measure.run(command)
    return whole, measure.run(command), json.loads(whole.stdout)


def dd_once(release: Path, output: Path) -> float:
    """Seconds that dd takes to read all files of the release and to write those of `output`."""
    sources, copies = measure.files_of(release), measure.files_of(output)
    place = output.with_name("dd")
    measure.drop_from_cache(sources)
    read = [measure.run(_dd(source, Path("/dev/null"))) for source in sources]
    seconds = sum(run.seconds for run in read)
    for file in copies:
        _warm(file)
        seconds += measure.run([*_dd(file, place), "conv=fsync"]).seconds
        place.unlink()
    return seconds


def _dd(source: Path, target: Path) -> list[str]:
    return ["dd", f"if={source}", f"of={target}", "bs=4M", "status=none"]


def _warm(file: Path) -> None:
    """Puts a file into the page cache, so that writing its bytes elsewhere reads no disk."""
    measure.run(_dd(file, Path("/dev/null")))


def figures(rules: str, release: Path, work: Path, repeat: int) -> dict:
    output = work / rules
    runs, copies = [], []
    for _ in range(repeat):
        runs.append(quantize_once(rules, release, output))
        copies.append(dd_once(release, output))
    seconds = median(found.seconds for found, _, _ in runs)
    start = median(found.seconds for _, found, _ in runs)
    source = measure.total_bytes(measure.files_of(release))
    written = measure.total_bytes(measure.files_of(output))
    shutil.rmtree(output)
    return {
        "bench": "weight_only",
        "rules": rules,
        "seconds": seconds,
        "all_seconds": [found.seconds for found, _, _ in runs],
        "cpu_seconds": median(found.cpu_seconds for found, _, _ in runs),
        "start_seconds": start,
        "start_cpu_seconds": median(found.cpu_seconds for _, found, _ in runs),
        "source_bytes": source,
        "output_bytes": written,
        "source_gb_per_second": source / seconds / 1e9,
        "dd_seconds": median(copies),
        "all_dd_seconds": copies,
        "ratio_to_dd": seconds / median(copies),
        "ratio_without_start": (seconds - start) / median(copies),
        "peak_rss": max(found.peak_rss for found, _, _ in runs),
        "peak_anonymous": max(found.peak_anonymous for found, _, _ in runs),
        "busy_share": {
            what: median(report["busy_seconds"][what] / found.seconds for found, _, report in runs)
            for what in runs[0][2]["busy_seconds"]
        },
    } | measure.conditions()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--release", type=Path)
    parser.add_argument("--work", type=Path, help="for what is made; default a temporary place")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rules", nargs="*", default=["int4-absmax", "int4-mse"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        release = release_at(given.release, Path(work))
        for rules in given.rules:
            print(json.dumps(figures(rules, release, Path(work), given.repeat)), flush=True)


if __name__ == "__main__":
    main()
