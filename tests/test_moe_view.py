"""Layers alone and the routing of tokens, held to whole models in memory and to plain loops."""

from collections import Counter
from dataclasses import replace
from functools import partial
from os.path import relpath
from pathlib import Path

import pytest
import torch
from conftest import own_text
from torch import Tensor, nn

import grokquant
from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.evaluation import measure
from grokquant.evaluation.measure import Windows, compare_texts
from grokquant.evaluation.report import Report
from grokquant.families.grok_model import GrokDecoderLayer
from grokquant.streaming import blocks
from grokquant.text.documents import load_documents, token_rows
from grokquant.text.tokenizer import load_tokenizer

EXPERT_COUNT = 4
SETTINGS = {"samples": 6, "length": 50}
close = partial(pytest.approx, rel=1e-4)


@pytest.fixture(scope="module")
def output(tmp_path_factory, tiny_release, text_file) -> Path:
    """The tiny release on a coarse grid, attention and all."""
    rule = {"match": "layers.*", "method": "rtn", "bits": 4, "group": 128}
    return grokquant.quantize(
        {
            "model": {"path": str(tiny_release)},
            "quantize": [rule],
            "output": {"path": str(tmp_path_factory.mktemp("out") / "int4")},
            "eval": {"text": relpath(text_file), **SETTINGS},
        }
    )


@pytest.fixture(scope="module")
def report(output, tiny_release) -> Report:
    return grokquant.evaluate(output, tiny_release, text=own_text(output))


class Whole:
    """A model in memory and, layer by layer, what enters, leaves and happens inside on `rows`."""

    def __init__(self, path: Path) -> None:
        self.model, _ = grokquant.load(path, dtype=torch.float32, packed=False)
        self.layers = [m for m in self.model.modules() if isinstance(m, GrokDecoderLayer)]

    @torch.no_grad()
    def run(self, rows: Tensor) -> list["Seen"]:
        seen, hooks = [Seen(layer) for layer in self.layers], []
        for one in seen:
            hooks += one.hooks()
        self.logits = self.model(input_ids=rows).logits
        for hook in hooks:
            hook.remove()
        return seen


class Seen:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def hooks(self) -> list:
        moe = self.layer.block_sparse_moe
        return [
            self.layer.register_forward_hook(self._layer, with_kwargs=True),
            self.layer.self_attn.register_forward_hook(self._attention),
            moe.gate.register_forward_hook(self._router),
            moe.register_forward_hook(self._moe),
        ]

    def _layer(self, _, args, kwargs, out) -> None:
        self.args, self.kwargs, self.left = args, kwargs, out

    def _attention(self, _, args, out) -> None:
        self.attention = out

    def _router(self, _, args, out) -> None:
        self.inputs, (_, self.gates, self.experts) = args[0], out

    def _moe(self, _, args, out) -> None:
        self.mixed = out

    @torch.no_grad()
    def through(self, layer: nn.Module) -> "Seen":
        """What another layer does with what entered this one."""
        other = Seen(layer)
        hooks = other.hooks()
        layer(*self.args, **self.kwargs)
        for hook in hooks:
            hook.remove()
        return other


@pytest.fixture(scope="module")
def pair(output, tiny_release, text_file) -> tuple[Whole, list[Seen], list[Seen], Whole, Tensor]:
    base, own = Whole(tiny_release), Whole(output)
    tokenizer = load_tokenizer(open_checkpoint(tiny_release))
    rows = token_rows(load_documents(str(text_file), "heldout"), tokenizer, 6, 50, None)
    return own, own.run(rows), base.run(rows), base, rows


def off(x: Tensor, reference: Tensor) -> float:
    return ((x - reference).norm() / reference.norm()).item()


def expert_output(layer: nn.Module, expert: int, x: Tensor) -> Tensor:
    experts = layer.block_sparse_moe.experts
    return experts.down_proj[expert] @ experts._apply_gate(experts.gate_up_proj[expert] @ x)


def agreement(own: Seen, base: Seen) -> tuple[float, float]:
    pairs = list(zip(own.experts.tolist(), base.experts.tolist(), strict=True))
    first = sum(a[0] == b[0] for a, b in pairs) / len(pairs)
    return first, sum(set(a) == set(b) for a, b in pairs) / len(pairs)


def test_layers_alone_are_whole_layers_on_the_states_of_the_reference(report, pair):
    own, _, base_seen, _, rows = pair
    for figures, layer, base in zip(report.layers, own.layers, base_seen, strict=True):
        forced, seen = figures.forced, base.through(layer)
        assert forced.tokens == rows.numel()
        assert forced.block_error == close(off(seen.left, base.left))
        assert forced.attention_error == close(off(seen.attention, base.attention))
        first, both = agreement(seen, base)
        assert forced.router_top1 == pytest.approx(first, abs=1e-12)
        assert forced.router_top2_set == forced.router_set == pytest.approx(both, abs=1e-12)
    # What comes before a layer costs more than the layer's own attention.
    last = report.layers[1]
    assert last.router_set < last.forced.router_set < 1
    assert last.relative_error > last.forced.block_error > 0


@torch.no_grad()
def test_damage_is_that_of_a_loop_over_tokens_and_experts(report, pair):
    own, _, base_seen, _, _ = pair
    for figures, layer, base in zip(report.layers, own.layers, base_seen, strict=True):
        damage, wrong = Counter(), torch.zeros_like(base.inputs)
        for t, x in enumerate(base.inputs):
            for gate, expert in zip(base.gates[t], base.experts[t].tolist(), strict=True):
                y, y_q = (expert_output(one, expert, x) for one in (base.layer, layer))
                damage[expert] += (gate * (y_q - y)).double().square().sum().item()
                wrong[t] += gate * (y_q - y)
        total = sum(damage.values())
        assert sum(figures.forced.damage) == pytest.approx(1, abs=1e-12)
        assert figures.forced.damage == close([damage[e] / total for e in range(EXPERT_COUNT)])
        assert figures.forced.experts_error == close((wrong.norm() / base.mixed.norm()).item())


def test_tokens_are_split_by_the_first_layer_that_sends_them_elsewhere(report, pair):
    own, own_seen, base_seen, base, _ = pair
    log_q, log_p = (m.logits[:, :-1].double().log_softmax(-1) for m in (own, base))
    kld = (log_p.exp() * (log_p - log_q)).sum(-1).flatten()
    scored = [w * 50 + p for w in range(6) for p in range(49)]
    groups: dict[int, list[float]] = {-1: [], 0: [], 1: []}
    for place, value in zip(scored, kld.tolist(), strict=True):
        changed = [
            i
            for i, (a, b) in enumerate(zip(own_seen, base_seen, strict=True))
            if set(a.experts[place].tolist()) != set(b.experts[place].tolist())
        ]
        groups[changed[0] if changed else -1].append(value)
    found, total = report.routing, sum(kld.tolist())

    def check(group, values: list[float]) -> None:
        assert group.tokens == len(values) > 0
        assert group.mean_kld == close(sum(values) / len(values))
        assert group.share_of_kld == close(sum(values) / total)

    check(found.unchanged, groups[-1])
    check(found.changed, groups[0] + groups[1])
    for group, layer in zip(found.first_change, (0, 1), strict=True):
        assert group.layer == layer
        check(group, groups[layer])
    assert found.changed.mean_kld > found.unchanged.mean_kld


def test_load_shift_is_what_would_have_to_move(report):
    for layer in report.layers:
        more = [
            max(a - b, 0)
            for a, b in zip(layer.tokens_per_expert, layer.reference_tokens_per_expert, strict=True)
        ]
        assert layer.load_shift == pytest.approx(sum(more) / (6 * 50 * 2))
    assert report.layers[1].load_shift > 0


@pytest.mark.parametrize("at_once", [7, 130])
def test_parts_of_tokens_give_the_same(report, output, tiny_release, monkeypatch, at_once):
    """Rows and experts run in pieces, so what is seen inside comes in pieces."""
    monkeypatch.setattr(blocks, "TOKENS_AT_ONCE", at_once)
    found = grokquant.evaluate(output, tiny_release, text=own_text(output))
    for one, other in zip(found.layers, report.layers, strict=True):
        assert one.forced.damage == close(other.forced.damage)
        assert one.forced.attention_error == close(other.forced.attention_error)
        assert one.forced.experts_error == close(other.forced.experts_error)


def test_some_windows_are_enough(report, output, tiny_release, monkeypatch):
    """Layers alone are measured on the first windows; all else is as with all of them."""
    monkeypatch.setattr(measure, "_FORCED", 120)
    found = grokquant.evaluate(output, tiny_release, text=own_text(output))
    assert [layer.forced.tokens for layer in found.layers] == [100, 100]
    assert found.kld.mean.value == close(report.kld.mean.value)
    for one, other in zip(found.layers, report.layers, strict=True):
        assert one.router_set == pytest.approx(other.router_set)
        assert one.forced.attention_error == pytest.approx(other.forced.attention_error, rel=0.2)


def test_layers_need_not_be_measured_alone(report, output, tiny_release):
    found = grokquant.evaluate(output, tiny_release, quick=True, text=own_text(output))
    assert [layer.forced for layer in found.layers] == [None, None]
    assert found.routing.changed.tokens == report.routing.changed.tokens
    assert found.kld.mean.value == close(report.kld.mean.value)


def test_a_lossless_copy_does_no_damage(tiny_release, text_file, tmp_path):
    found = grokquant.evaluate(tiny_release, tiny_release, text=str(text_file), **SETTINGS)
    for layer in found.layers:
        assert layer.load_shift == 0 and layer.forced.router_set == 1
        assert layer.forced.block_error < 1e-6
        assert sum(layer.forced.damage) == pytest.approx(1) or not any(layer.forced.damage)
    assert found.routing.changed.tokens == 0 and found.routing.changed.mean_kld is None


def counted(checkpoint: Checkpoint, reads: Counter, side: str) -> Checkpoint:
    """The checkpoint, with every tensor that is read from it counted."""

    def load(ref):
        reads[f"{side} {ref.name}"] += 1
        return ref.load()

    tensors = {
        name: replace(ref, load=partial(load, ref))
        for name, ref in checkpoint.source.tensors.items()
    }
    return replace(checkpoint, source=replace(checkpoint.source, tensors=tensors))


def test_layers_are_read_once_for_both_paths(output, tiny_release):
    reads: Counter[str] = Counter()
    both = [counted(open_checkpoint(path), reads, str(path)) for path in (output, tiny_release)]
    found = compare_texts(*both, [Windows(torch.arange(120).view(4, 30))])
    assert all(layer.forced for layer in found.layers)
    assert set(reads.values()) == {1}
    assert len(reads) == sum(len(checkpoint.source.tensors) for checkpoint in both)
