"""Carrying a layer of Grok-1's true shapes over in int8, against cp of the same files.

    python eval/bench/lossless.py [--release DIR] [--work DIR] [--repeat 3]

Both start from a cold page cache and end with everything on disk: `grokquant quantize` by itself,
cp by a sync of the copy. Prints a JSON line; `share` is that of cp's speed which the run reaches.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import measure
from real_layer import release_at
from weight_only import quantize_once


def copy_once(release: Path, copy: Path) -> tuple[float, float]:
    """Seconds that cp takes, and those until the copy is on disk as well."""
    measure.drop_from_cache(measure.files_of(release))
    start = time.perf_counter()
    measure.run(["cp", "-r", str(release), str(copy)])
    copied = time.perf_counter() - start
    measure.run(["sync", *map(str, measure.files_of(copy))])
    durable = time.perf_counter() - start
    shutil.rmtree(copy)
    return copied, durable


def figures(release: Path, work: Path, repeat: int) -> dict:
    output = work / "int8"
    runs, copies = [], []
    for _ in range(repeat):
        runs.append(quantize_once("int8-lossless", release, output))
        written = measure.total_bytes(measure.files_of(output))
        shutil.rmtree(output)
        copies.append(copy_once(release, work / "copy"))
    seconds = median(found.seconds for found, _ in runs)
    copied, durable = (median(column) for column in zip(*copies, strict=True))
    return {
        "bench": "lossless",
        "seconds": seconds,
        "all_seconds": [found.seconds for found, _ in runs],
        "source_bytes": measure.total_bytes(measure.files_of(release)),
        "output_bytes": written,
        "cp_sync_seconds": durable,
        "cp_seconds": copied,
        "share": durable / seconds,
        "share_of_cp_without_sync": copied / seconds,
        "peak_rss": max(found.peak_rss for found, _ in runs),
        "peak_anonymous": max(found.peak_anonymous for found, _ in runs),
    } | measure.conditions()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--release", type=Path)
    parser.add_argument("--work", type=Path, help="for what is made; default a temporary place")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        release = release_at(given.release, Path(work))
        print(json.dumps(figures(release, Path(work), given.repeat)))


if __name__ == "__main__":
    main()
