"""Evaluating a layer of Grok-1's true shapes against its source, streamed from a cold disk.

    python eval/bench/streamed_eval.py [--release DIR [--quantized DIR]] [--work DIR] [--tokens N]
        [--dtypes NAME ..] [--hidden N] [--inner N] [--experts N]

Prints a JSON line for each dtype of the products of experts: wall and CPU seconds, peak memory, and
the bytes read from disk over those of both checkpoints (1 means that each was read once). Makes
what is not given, in WORK. Grok-1's sizes take a busy machine more than a quarter of an hour;
`--hidden 1536 --inner 8192 --experts 2 --tokens 512` is a ninth of the disk and far less work.
"""

import argparse
import json
import tempfile
from pathlib import Path

import measure
from real_layer import quantize_command, release_at

LENGTH = 256


def measure_evaluation(
    release: Path, quantized: Path, tokens: int, dtype: str, reports: Path
) -> dict:
    """Evaluates `quantized` against `release` on windows of LENGTH tokens, with the products of
    experts in `dtype`."""
    files = measure.files_of(release) + measure.files_of(quantized)
    measure.drop_from_cache(files)
    command = [*measure.GROKQUANT, "eval", str(quantized), "--reference", str(release), "--json"]
    window = ["--samples", str(tokens // LENGTH), "--length", str(LENGTH), "--dtype", dtype]
    found = measure.run([*command, *window, "--output", str(reports)])
    report = json.loads(found.stdout)
    return {
        "bench": "streamed_eval",
        "tokens": tokens,
        "dtype": dtype,
        "seconds": found.seconds,
        "cpu_seconds": found.cpu_seconds,
        "peak_rss": found.peak_rss,
        "peak_anonymous": found.peak_anonymous,
        "disk_read": found.disk_read,
        "model_bytes": measure.total_bytes(files),
        "read_share": found.disk_read / measure.total_bytes(files),
        "mean_kld": report["kld"]["mean"]["value"],
        "noise_kld": report["noise_floor"]["mean_kld"],
    } | measure.conditions()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--release", type=Path)
    parser.add_argument("--quantized", type=Path, help="an int4 result of that release")
    parser.add_argument("--work", type=Path, help="for what is made; default a temporary place")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=6144, help="of a release that is made")
    parser.add_argument("--inner", type=int, default=32768)
    parser.add_argument("--experts", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        sizes = {
            "hidden_size": given.hidden,
            "intermediate_size": given.inner,
            "num_local_experts": given.experts,
        }
        release = release_at(given.release, Path(work), **sizes)
        quantized = given.quantized
        if quantized is None:
            quantized = Path(work, "int4")
            measure.run(quantize_command("int4-absmax", release, quantized))
        for dtype in given.dtypes:
            reports = Path(work, f"report-{dtype}")
            line = measure_evaluation(release, quantized, given.tokens, dtype, reports)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
