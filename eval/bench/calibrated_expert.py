"""A calibrated layer with one expert of Grok-1's shape: each step as a share of this machine's own
matrix products in the same run, and against what `plan` foretells.

    python eval/bench/calibrated_expert.py [--release DIR] [--rows N] [--hidden N] [--inner N]

The code of a run quantizes the layer by recipes/grok-1-int4-g128.yaml and discards it. Everything
counts CPU time of one thread, so that the machine may be busy. `share` is the rate of a step
divided by that of a large product: of bfloat16 for forward passes and Hessians (one triangle
counts), of float32 for the solver. `planned` is the sum of the plan's steps divided by those of the
run. Without --release a layer is made, of 4 GB. Prints one JSON line.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest.mock import patch

import measure
import torch
from gptq_expert import Clock
from make_release import write_random_grok
from torch import Tensor

from grokquant.calibration import site
from grokquant.families.grok_model import Grok1Config
from grokquant.job import hidden_units, layer
from grokquant.job.budget import probe_model, timing
from grokquant.job.plan import Plan, build_plan
from grokquant.job.workdir import States
from grokquant.methods import METHODS, gptq
from grokquant.recipe import load_recipe
from grokquant.streaming.blocks import CALIBRATION_DTYPE, BlockwiseModel
from grokquant.text.documents import calibration_rows
from grokquant.text.tokenizer import load_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "grok-1-int4-g128.yaml"
OUTSIDE, EXPERTS = "forward outside experts", "forward of experts"
HESSIANS, FACTORIZATION, ROUNDING = "Hessians", "factorization", "rounding"
AROUND = "reading and checking"  # which the plan counts as rounding
# Where the time of each step is spent.
PLACES: list[tuple[object, str, str]] = [
    (BlockwiseModel, "_run_rows", OUTSIDE),
    (BlockwiseModel, "_add_mixture", OUTSIDE),
    (hidden_units.HiddenUnits, "__init__", EXPERTS),
    (BlockwiseModel, "_take_outputs", EXPERTS),
    (site, "accumulate", HESSIANS),
    (gptq, "factorize", FACTORIZATION),
    (gptq, "round_gptq", ROUNDING),
    (layer, "round_unit", AROUND),
]
REPEATS = 3  # of a product, before the layer and after it


def product_rate(dtype: torch.dtype) -> float:
    """Multiply-adds per second of a large product."""
    A = torch.randn(2048, 4096).to(dtype)
    B = torch.randn(2048, 4096).to(dtype)
    A @ B.T
    start = time.process_time()
    A @ B.T
    return 2048 * 2048 * 4096 / (time.process_time() - start)


def timed(clock: Clock, step: str, function: Callable) -> Callable:
    def run(*given, **options):
        with clock.step(step):
            return function(*given, **options)

    return run


def run_layer(plan: Plan, rows: Tensor) -> dict[str, float]:
    """Seconds by step of quantizing the layer."""
    model = BlockwiseModel(plan.checkpoint, CALIBRATION_DTYPE, pieces=True)
    states = States(model.embed(rows))
    model.free_embedding()
    quantizer = layer.LayerQuantizer(plan, model, 0, lambda *_: None, lambda _: None)
    clock = Clock(time.process_time)
    for owner, name, step in PLACES:
        patch.object(owner, name, timed(clock, step, getattr(owner, name))).start()
    with clock.step("rest"):
        quantizer.run(states)
    patch.stopall()
    return clock.seconds


def planned_times(plan: Plan) -> dict[str, float]:
    with (
        patch.object(timing, "perf_counter", time.process_time),
        patch.object(probe_model, "perf_counter", time.process_time),
    ):
        return timing.expected_times(plan)


def multiply_adds(plan: Plan, tokens: int) -> dict[str, float]:
    """Those of the expert's forward passes, of its Hessians and of the solver."""
    experts = [unit for unit in plan.units_of(0) if unit.expert is not None]
    counts = dict.fromkeys((EXPERTS, HESSIANS, "solver"), 0.0)
    for unit in experts:
        rows, columns = unit.shape
        method = METHODS[unit.method]
        cost = method.cost(rows, columns, unit.settings)
        counts[EXPERTS] += tokens * rows * columns
        counts["solver"] += cost.products
        if unit.part != "up":  # which shares what gate has
            block = method.block_columns(columns, unit.settings)
            counts[HESSIANS] += tokens * columns * block / 2
            counts["solver"] += cost.shared_products
    return counts


def figures(plan: Plan) -> dict:
    planned = planned_times(plan)
    settings = plan.recipe.calibration
    rows = calibration_rows(settings, load_tokenizer(plan.checkpoint), plan.checkpoint)
    rates = {"bfloat16": [], "float32": []}
    seconds: dict[str, float] = {}
    for measured in (False, True):
        for name, found in rates.items():
            found += [product_rate(getattr(torch, name)) for _ in range(REPEATS)]
        if not measured:
            seconds = run_layer(plan, rows)
    bfloat16, float32 = (median(found) for found in rates.values())
    counts = multiply_adds(plan, rows.numel())
    solver = seconds[FACTORIZATION] + seconds[ROUNDING]
    steps = (OUTSIDE, EXPERTS, HESSIANS, FACTORIZATION, ROUNDING)
    return {
        "bench": "calibrated_expert",
        "tokens": rows.numel(),
        "shapes": {unit.part: unit.shape for unit in plan.units_of(0) if unit.expert == 0},
        "share": {
            EXPERTS: counts[EXPERTS] / seconds[EXPERTS] / bfloat16,
            HESSIANS: counts[HESSIANS] / seconds[HESSIANS] / bfloat16,
            "solver": counts["solver"] / solver / float32,
        },
        "flops": {"bfloat16": 2 * bfloat16, "float32": 2 * float32},
        "cpu_seconds": seconds,
        "planned_cpu_seconds": {step: planned[step] for step in steps},
        "planned": sum(planned[step] for step in steps) / sum(seconds.values()),
    } | measure.conditions()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--release", type=Path, help="one layer, one expert; default a new one")
    parser.add_argument("--rows", type=int, default=4, help="of 2048 tokens")
    parser.add_argument("--hidden", type=int, default=6144)
    parser.add_argument("--inner", type=int, default=32768)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        release = given.release or Path(work, "release")
        if not release.exists():
            config = Grok1Config(
                hidden_size=given.hidden,
                intermediate_size=given.inner,
                num_hidden_layers=1,
                num_local_experts=1,
                num_experts_per_tok=1,
            )
            write_random_grok(release, config)
        text = Path(work, "text.txt")
        text.write_text(" ".join(str(number) for number in range(4000 * given.rows)))
        keys = {
            "model.path": release,
            "calibration.text": text,
            "calibration.samples": given.rows,
            "output.path": Path(work, "output"),
            "experts.blend_tokens": 0,  # or so few tokens would need a Hessian more
        }
        recipe = load_recipe(RECIPE, [f"{key}={value}" for key, value in keys.items()])
        print(json.dumps(figures(build_plan(recipe))), flush=True)


if __name__ == "__main__":
    main()
