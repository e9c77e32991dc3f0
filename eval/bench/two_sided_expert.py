"""Two-sided rounding of one whole expert beside GPTQ of it: seconds, and the peaks of memory.

    python eval/bench/two_sided_expert.py [--tokens N] [--hidden N] [--inner N] [--bits N]

Weights and inputs are those of `gptq_expert.py`; the original's inputs differ from them by a tenth.
Both methods are called as in a run, one matrix after the other, Hessians included; two-sided
rounding holds an eighth of the tokens out. Prints a JSON line for each; `cpu_ratio` is to GPTQ in
the same run. Grok-1's are --hidden 6144 --inner 32768.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from gptq_expert import activations, peak_rss, weights
from measure import conditions
from torch import Tensor

from grokquant.calibration.site import Site
from grokquant.grids import Scheme
from grokquant.methods import METHODS
from grokquant.methods.method import Aim, Rounded
from grokquant.types import Matrix, Unit

PARTS = ("gate", "up", "down")
AT_ONCE = 2048
HELD_OUT = 8

Inputs = Callable[[Tensor], Iterator[Tensor]]
# The aim of some tokens.
Aims = Callable[[slice], Aim]


def hidden_units(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


@dataclass
class Expert:
    """A layer with one expert, as a method sees it."""

    W: Mapping[str, Tensor]
    units: list[Unit]
    index: int = 0
    mixture_gain: None = None
    output_gradients: Tensor = field(default_factory=lambda: torch.zeros(0))

    def original(self, tensor: str) -> Tensor:
        return self.W[tensor]

    def expert_tensors(self, expert: int) -> dict[str, str]:
        return {part: part for part in PARTS}

    def slopes(self, expert: int, gate: Tensor, up: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            inputs = gate.requires_grad_(), up.requires_grad_()
            by_gate, by_up = torch.autograd.grad(hidden_units(*inputs).sum(), inputs)
        return by_gate, by_up

    def later_routers(self) -> Iterator[Tensor]:
        return iter([torch.randn(8, len(self.output_gradients))])


def units_of(method: str, W: Mapping[str, Tensor], scheme: Scheme) -> list[Unit]:
    settings = METHODS[method].settings()
    if method == "two-sided":
        settings = type(settings)(metric="gradients")
    how = {"scheme": scheme, "method": method, "settings": settings, "rule": 0}
    places = [Matrix(part, part, 0, part, reads=part, expert=0) for part in PARTS]
    return [Unit(**vars(place), shape=W[place.part].shape, **how) for place in places]


def moments(size: int) -> Tensor:
    """A covariance of gradients, float32 [size, size], up to a factor."""
    g = activations(2 * size, size).float()
    return g.T @ g


def inner(gate: Tensor, up: Tensor, X: Tensor) -> Iterator[Tensor]:
    for x in X.split(AT_ONCE):
        yield hidden_units(x @ gate.T, x @ up.T)


def outputs(gate: Tensor, up: Tensor, down: Tensor, X: Tensor) -> Tensor:
    """float32 [tokens, hidden]"""
    return torch.cat([(units @ down.T).float() for units in inner(gate, up, X)])


def site_of(X: Tensor, inputs: Inputs, aim: Aims | None, features: int) -> Site:
    """The site of some tokens; the last eighth of those that have an aim is held out."""
    if aim is None:
        return Site(len(X), features, lambda: inputs(X))
    kept = len(X) - len(X) // HELD_OUT
    own, other = (
        Site(len(X[part]), features, lambda part=part: inputs(X[part]), aim=aim(part))
        for part in (slice(0, kept), slice(kept, None))
    )
    own.held_out = other
    return own


def round_all(
    method: str, W: Mapping[str, Tensor], X: Tensor, aims: Mapping[str, Aims], scheme: Scheme
) -> dict[str, Rounded]:
    """The three matrices of an expert, down on what the others give."""
    units = units_of(method, W, scheme)
    expert = Expert(W, units, output_gradients=moments(X.shape[1]))
    rounding = METHODS[method].begin_layer(expert)  # type: ignore[arg-type]
    site = site_of(X, lambda x: iter(x.split(AT_ONCE)), aims.get("gate"), X.shape[1])
    rounded = {unit.part: rounding.round(unit, W[unit.part], site) for unit in units[:2]}
    gate, up = (rounded[part].quantized.dequantize() for part in PARTS[:2])
    site = site_of(X, lambda x: inner(gate, up, x), aims.get("down"), len(gate))
    return rounded | {"down": rounding.round(units[2], W["down"], site)}


def measure(method: str, W: Mapping[str, Tensor], X: Tensor, scheme: Scheme) -> dict:
    """Seconds, CPU seconds, output errors, and the share lost of the original's outputs."""
    X_f = (X.float() * (1 + 0.1 * torch.randn(X.shape[1]))).bfloat16()
    wanted = outputs(*(W[part] for part in PARTS), X_f)
    aims: dict[str, Aims] = {}
    if method == "two-sided":
        weigh = torch.ones(len(X))
        aims = {
            "gate": lambda part: Aim(weigh[part], lambda: iter(X_f[part].split(AT_ONCE))),
            "down": lambda part: Aim(weigh[part], outputs=lambda: wanted[part]),
        }
    start = time.perf_counter(), time.process_time()
    rounded = round_all(method, W, X, aims, scheme)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    lost = wanted - outputs(*(rounded[part].quantized.dequantize() for part in PARTS), X)
    return {
        "bench": "two_sided_expert",
        "method": method,
        "scheme": str(scheme),
        "seconds": round(seconds[0], 2),
        "cpu_seconds": round(seconds[1], 2),
        "peak_rss": peak_rss(),
        "output_error": {part: rounded[part].output_error for part in PARTS},
        "lost": round((lost.norm() / wanted.norm()).item(), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--bits", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    shapes = {part: (options.inner, options.hidden) for part in PARTS[:2]}
    shapes["down"] = (options.hidden, options.inner)
    W = {part: weights(*shape, seed) for seed, (part, shape) in enumerate(shapes.items())}
    X = activations(options.tokens, options.hidden)
    scheme = Scheme(options.bits, 128)
    gptq = 0.0
    for method in ("gptq", "two-sided"):
        result = measure(method, W, X, scheme)
        gptq = gptq or result["cpu_seconds"]
        result |= {"shape": list(shapes["gate"]), "tokens": options.tokens}
        result |= {"cpu_ratio": round(result["cpu_seconds"] / max(gptq, 0.01), 2)}
        print(json.dumps(result | {"threads": torch.get_num_threads()} | conditions()), flush=True)


if __name__ == "__main__":
    main()
