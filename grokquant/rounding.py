"""Rounding one unit by its method, and what there is to say about it afterwards."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor

from grokquant.calibration.hessian import Hessian
from grokquant.errors import InputError
from grokquant.methods.copy import copy_quantized
from grokquant.methods.gptq import Feedback, UnusableHessian, factorize, quantize_gptq
from grokquant.methods.rtn import quantize_rtn
from grokquant.recipe import Rule
from grokquant.types import QTensor, TensorRef, Unit, UnitReport


@dataclass
class Site:
    """The input that units share. Its Hessian and factors are made once, when first needed.

    `refusal` says why the Hessian is not to be used, `note` what was done to it.
    """

    tokens: int
    build: Callable[[], Hessian]
    refusal: str | None = None
    note: str | None = None
    _factors: dict[tuple[float, bool], Feedback] = field(default_factory=dict)

    @cached_property
    def hessian(self) -> Hessian:
        return self.build()

    def feedback(self, damping: float, act_order: bool) -> Feedback:
        """Raises UnusableHessian with the reason."""
        if self.refusal:
            raise UnusableHessian(self.refusal)
        key = (damping, act_order)
        if key not in self._factors:
            self._factors[key] = factorize(self.hessian.H, damping, act_order)
        return self._factors[key]


def round_unit(
    unit: Unit, rule: Rule, ref: TensorRef, site: Site | None
) -> tuple[QTensor, UnitReport]:
    """Quantizes one matrix as planned and reports on it.

    gptq without a usable Hessian falls back to rtn, and the report names the reason. Raises
    InputError where the source holds non-finite weights.
    """
    start = time.perf_counter()
    fallback: str | None = None
    errors: tuple[float, float | None] = (0.0, None)
    if unit.method == "copy":
        quantized = copy_quantized(ref.read_quantized(), unit.scheme)
    else:
        W = _finite(ref)
        quantized, fallback = _round(unit, rule, W, site)
        seen = site if unit.method == "gptq" and fallback is None else None
        errors = _errors(W, quantized, seen)
    return quantized, UnitReport(
        name=unit.name,
        method="rtn" if fallback else unit.method,
        scheme=unit.scheme,
        bits_per_weight=stored_bits(quantized) / quantized.codes.numel(),
        relative_error=errors[0],
        output_error=errors[1],
        seconds=time.perf_counter() - start,
        tokens=site.tokens if site else None,
        fallback=fallback,
        note=site.note if site and unit.method == "gptq" and not fallback else None,
    )


def stored_bits(quantized: QTensor) -> int:
    """Bits of codes, scales and zero points."""
    scheme, scales = quantized.scheme, quantized.scales
    zero_points = 0 if scheme.symmetric else scales.numel() * scheme.bits
    codes = quantized.codes.numel() * scheme.bits
    return codes + scales.numel() * scales.element_size() * 8 + zero_points


def _round(unit: Unit, rule: Rule, W: Tensor, site: Site | None) -> tuple[QTensor, str | None]:
    if unit.method == "gptq" and site is not None:
        try:
            feedback = site.feedback(rule.damping, rule.act_order)
            return quantize_gptq(W, feedback, unit.scheme, rule.scale), None
        except UnusableHessian as reason:
            return quantize_rtn(W, unit.scheme, rule.scale), str(reason)
    return quantize_rtn(W, unit.scheme, rule.scale), None


def _finite(ref: TensorRef) -> Tensor:
    W = ref.read().float()
    bad = ~torch.isfinite(W)
    if bad.any():
        first = bad.nonzero()[0].tolist()
        raise InputError(f"{ref.name}: {int(bad.sum())} non-finite weights, the first at {first}")
    return W


def _errors(W: Tensor, quantized: QTensor, site: Site | None) -> tuple[float, float | None]:
    """||W - Q|| / ||W|| of the weights, and of the outputs where a site has seen inputs."""
    error = W - quantized.dequantize().float()
    relative = (error.norm() / W.norm().clamp(min=1e-30)).item()
    if site is None:
        return relative, None
    H = site.hessian.H
    lost, total = ((M @ H).mul_(M).sum().item() for M in (error, W))
    return relative, sqrt(max(lost, 0.0) / max(total, 1e-30))
