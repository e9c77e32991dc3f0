"""Made-up reports, and what tests read back from a page."""

import copy
import math
from html.parser import HTMLParser
from typing import Any

from grokquant.evaluation.report import Report, TextFigures, parse_report

AWKWARD = """<b>a&b "c" 'd'|[red]"""


def estimate(value: float, error: float) -> dict:
    return {
        "value": value,
        "error": error,
        "low": value - 1.9 * error,
        "high": value + 2.1 * error,
        "token_error": error / 1.7,
    }


def content(layers: int = 4, experts: int = 8) -> dict:
    """A plausible report.json with numbers that no rounding leaves as they are."""

    def odd(*seed: int) -> float:
        return (
            math.modf(math.sin(sum((7 * i + 3) * s + i for i, s in enumerate(seed, 1))) * 997)[0]
            ** 2
        )

    def tokens(layer: int, salt: int) -> list[int]:
        return [1000 + int(900 * odd(layer, e, salt)) for e in range(experts if experts > 1 else 0)]

    routed = experts > 1

    def routers(i: int, salt: int) -> dict:
        return {
            "router_top1": 0.9 + odd(i, salt) / 12 if routed else None,
            "router_top2_set": 0.85 + odd(i, salt + 1) / 12 if routed else None,
            "router_set": 0.85 + odd(i, salt + 1) / 12 if routed else None,
        }

    def forced(i: int) -> dict:
        damage = [0.1 + odd(i, e, 8) for e in range(experts)] if routed else []
        return {
            "tokens": 16384,
            "block_error": 0.004 + odd(i, 9) / 200,
            "attention_error": 0.003 + odd(i, 10) / 200,
            "experts_error": 0.08 + odd(i, 11) / 20 if routed else None,
            **routers(i, 12),
            "damage": [share / sum(damage) for share in damage],
        }

    def layer(i: int) -> dict:
        return {
            "layer": i,
            "relative_error": 0.01 + odd(i, 1) / 50,
            **routers(i, 2),
            "tokens_per_expert": tokens(i, 4),
            "reference_tokens_per_expert": tokens(i, 5),
            "load_shift": 0.01 + odd(i, 6) / 30 if routed else None,
            "forced": forced(i),
        }

    def routing() -> dict:
        first = [100 + int(800 * odd(i, 7)) for i in range(layers)]
        changed = {"tokens": sum(first), "mean_kld": 0.0091234567, "share_of_kld": 0.31234567}
        return {
            "unchanged": {
                "tokens": 32640 - sum(first),
                "mean_kld": 0.0031234567,
                "share_of_kld": 0.68765433,
            },
            "changed": changed,
            "first_change": [
                {
                    "tokens": n,
                    "mean_kld": 0.009 + odd(i, 8) / 500,
                    "share_of_kld": 0.31234567 * n / sum(first),
                    "layer": i,
                }
                for i, n in enumerate(first)
            ],
        }

    def unit(i: int, e: int, matrix: str) -> dict:
        return {
            "name": f"layers.{i}.experts.{e}.{matrix}" if routed else f"layers.{i}.mlp.{matrix}",
            "layer": i,
            "expert": e if routed else None,
            "method": "gptq",
            "scheme": "int4 g128 sym",
            "bits_per_weight": 4.125,
            "relative_error": 0.1 + odd(i, e, len(matrix)) / 40,
            "output_error": 0.05 + odd(e, i, len(matrix)) / 40,
            "held_out_error": None,
            "tokens": 4321,
            "fallback": None,
        }

    model = {"family": "grok-1", "layers": layers, "experts": experts, "parameters": 7_712_345}
    return {
        "schema": "grokquant.evaluation/2",
        "grokquant": "0.1.0",
        "quantized": model
        | {"path": "/data/toy-int4", "bytes": 4_106_824, "bits_per_weight": 4.2599961}
        | {
            "schemes": {"int4 g128 sym (gptq)": 96, "int8 release sym (copy)": 16},
            "format": "compressed-tensors",
        },
        "reference": model
        | {
            "path": f"/data/{AWKWARD}",
            "bytes": 8_290_771,
            "bits_per_weight": 8.6,
            "schemes": {},
            "format": None,
        },
        "protocol": {
            "text": "python-docs (held-out)",
            "text_sha256": "9f86d081884c7d659a2feaa0c55ad015",
            "samples": 128,
            "length": 256, "packed": True, "asked_length": None,
            "tokens_scored": 32640,
            "scored": "every token but the first of each sequence",
            "bos": False,
            "arithmetic": "float32 on bf16 weights",
        },
        "bootstrap": {
            "unit": "document",
            "clusters": 2,
            "resamples": 2000,
            "seed": 0,
            "method": "percentiles",
        },
        "perplexity": {
            "reference": estimate(19.837410291, 0.2419312),
            "quantized": estimate(19.918742113, 0.2438177),
            "ratio": estimate(1.004099912, 0.000812345),
            "ln_ratio": estimate(0.004091533, 0.000809031),
            "difference": estimate(0.081331822, 0.016112333),
            "correlation": 0.998712345,
        },
        "kld": {
            "mean": estimate(0.0041234567, 0.0000612345),
            "maximum": 1.834121, "99.9%": 0.2213456, "99.0%": 0.05123456, "95.0%": 0.01661234,
            "90.0%": 0.009811234, "median": 0.001511234, "10.0%": 0.0001211234,
            "5.0%": 4.411234e-05, "1.0%": 4.21234e-06, "0.1%": 3.11234e-07, "minimum": -2.11e-09,
        },
        "delta_p": {
            "mean": estimate(-0.000812345, 0.000110987),
            "maximum": 0.37121234, "99.9%": 0.1503123, "99.0%": 0.0641123, "95.0%": 0.0253123,
            "90.0%": 0.0131123, "median": -1.1123e-06, "10.0%": -0.0149123, "5.0%": -0.0288123,
            "1.0%": -0.0720123, "0.1%": -0.1711123, "minimum": -0.4412123,
            "rms": estimate(0.020131234, 0.000311234),
            "75.0%": 0.0021123, "25.0%": -0.0024123,
        },
        "same_top_p": estimate(0.962312345, 0.001051234),
        "documents": {
            "tokens": [20000, 12640],
            "nll": [59812.123, 37889.456],
            "nll_reference": [59733.221, 37820.119],
            "kld": [81.1234567, 53.4657],
            "same_top": [19250, 12160],
        },
        "noise_floor": {
            "mean_kld": 1.3123e-09,
            "perplexity_ratio": 0.9999999912,
            "same_top_p": 0.9999123,
            "how": "reference against itself, reordered",
            "note": None,
        },
        "routing": routing() if routed else None,
        "layers": [layer(i) for i in range(layers)],
        "units": [
            unit(i, e, m)
            for i in range(layers)
            for e in range(experts)
            for m in ("gate", "up", "down")
        ],
        "passage": {
            "before": "def read(path):\n    ",
            "tokens": [
                {"text": f" {word}", "reference": f" {word}", "reference_p": 0.7123456,
                 "quantized": f" {own}", "quantized_p": 0.6123456}
                for word, own in [("with", "with"), ("open", "<b>"), ("(", "\n"), ("", "")]
            ],
            "generated": {
                "reference": [" with", " open", "(path", ")"],
                "quantized": [" with", " <i>", "\n", "\n"],
                "same": 1,
            },
            "not_generated": None,
        },
    }  # fmt: skip


def with_suite(layers: int = 4, experts: int = 8) -> dict:
    """The content of a report of a suite: two texts, two tasks, three thresholds, one missed."""
    tree = content(layers, experts)
    keys = [key for key in TextFigures.model_fields if key in tree]
    text = copy.deepcopy({key: tree[key] for key in keys})
    text["protocol"] |= {"length": 512, "scored": "the second half of each sequence"}
    text["kld"]["mean"] = estimate(0.0051234567, 0.0000712345)
    paired = {
        "items": 640,
        "reference": 0.71875,
        "quantized": 0.7015625,
        "difference": estimate(-0.0171875, 0.0081234),
        "lost": 19,
        "gained": 8,
        "p_value": 0.052312345,
    }

    def metric(name: str, better: bool, own: float, base: float, error: float | None) -> dict:
        sides = {"quantized": {"value": own, "error": error}}
        sides |= {"reference": {"value": base, "error": error}}
        pairs = paired if error is not None else None
        return {"metric": name, "filter": "none", "higher_is_better": better, "items": 640,
                **sides, "paired": pairs}  # fmt: skip

    def task(name: str, *metrics: dict) -> dict:
        return {"name": name, "version": "1.0", "fewshot": 0, "items": 640, "sha256": "9f86d08",
                "metrics": list(metrics)}  # fmt: skip

    def gate(threshold: str, where: str, value: float, limit: float, met: bool) -> dict:
        return {"threshold": threshold, "where": where, "value": value, "limit": limit, "met": met}

    return tree | {
        "further_texts": [text],
        "tasks": {
            "lm_eval": "0.4.13",
            "max_length": 2048,
            "prefix_token": 1,
            "tasks": [
                task("docs_choice", metric("acc", True, 0.7015625, 0.71875, 0.0181234)),
                task("docs_text", metric("word_perplexity", False, 41.212345, 40.112345, None)),
            ],
        },
        "suite": {
            "name": "smoke",
            "gates": [
                gate("max_mean_kld", "python-docs (held-out)", 0.0051234567, 0.01, True),
                gate("min_same_top_p", "python-docs (held-out)", 0.962312345, 0.95, True),
                gate("max_accuracy_drop", "docs_choice (acc)", 0.0171875, 0.01, False),
            ],
        },
    }


def report(layers: int = 4, experts: int = 8) -> Report:
    return parse_report(content(layers, experts), "test")


def changed(path: str, value: object) -> dict:
    """The content with the value at a JSON pointer replaced."""
    result = copy.deepcopy(content())
    *parents, last = path.strip("/").split("/")
    node = result
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value
    return result


class Page(HTMLParser):
    """Collects (data-path, data-value, data-unit, text) and all tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.data: list[list] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self._open: list | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if "data-path" in found:
            self._open = [found["data-path"], found["data-value"], found.get("data-unit"), ""]
            self.data.append([*self._open[:3], "", tag])

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open is not None:
            self.data[-1][3] += data


def at(tree: Any, path: str) -> float:
    for key in path.strip("/").split("/"):
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


def read_number(text: str) -> tuple[float, float]:
    """The value of a shown number and half a unit of its last digit."""
    text = text.replace("−", "-").replace(",", "").replace("\u00a0", " ").removesuffix(" %")
    mantissa, _, power = text.partition(" × 10")
    exponent = int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)
    decimals = len(mantissa.partition(".")[2])
    return float(mantissa) * 10**exponent, 0.5 * 10.0 ** (exponent - decimals)


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours, #rgb or #rrggbb."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
