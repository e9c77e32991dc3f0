"""What each choice is worth: mean KLD of the toy against bf16 for one grid or method a line.

    python eval/bench/quality.py [NAME ...]

Prints a JSON line per variant. Differences below twice the error are ties.
"""

import json
import sys
import tempfile
from pathlib import Path

import grokquant

GPTQ = {"method": "gptq", "bits": 4, "group": 128}
VARIANTS = {
    "copy": {"method": "copy"},
    "rtn-int8": {"method": "rtn", "bits": 8, "group": 128},
    "rtn-absmax": {"method": "rtn", "bits": 4, "group": 128, "scale": "absmax"},
    "rtn": {"method": "rtn", "bits": 4, "group": 128},
    "rtn-g32": {"method": "rtn", "bits": 4, "group": 32},
    "gptq": GPTQ,
    "gptq-absmax": GPTQ | {"scale": "absmax"},
    "gptq-no-act-order": GPTQ | {"act_order": False},
    "gptq-damping-0.1": GPTQ | {"damping": 0.1},
    "gptq-asymmetric": GPTQ | {"symmetric": False},
    "gptq-g32": GPTQ | {"group": 32},
    "gptq-channel": GPTQ | {"group": "channel"},
    "two-sided": GPTQ | {"method": "two-sided"},
    "two-sided-g32": GPTQ | {"method": "two-sided", "group": 32},
}


def measure(name: str, directory: Path) -> dict:
    """Quantizes the toy's experts as VARIANTS[name] says and compares the result with bf16."""
    output = grokquant.quantize(
        {
            "model": {"path": "toy"},
            "calibration": {"samples": 128, "length": 256},
            "quantize": [
                {"match": "layers.*.experts.*", **VARIANTS[name]},
                {"match": "layers.*.attention.*", "method": "copy"},
            ],
            "output": {"path": str(directory / name)},
        }
    )
    report = grokquant.evaluate(output, "toy", samples=128, length=256)
    return {
        "bench": "quality",
        "variant": name,
        "kld": report.kld.mean.value,
        "kld_error": report.kld.mean.error,
        "ppl_ratio": report.perplexity.ratio.value,
        "same_top_p": report.same_top_p.value,
        "router_top2_set": min(layer.router_top2_set or 1.0 for layer in report.layers),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for name in sys.argv[1:] or VARIANTS:
            print(json.dumps(measure(name, Path(directory))), flush=True)


if __name__ == "__main__":
    main()
