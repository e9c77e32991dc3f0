"""Rounding one unit by its method, and what there is to say about it afterwards."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from types import ModuleType

import torch
from torch import Tensor

from grokquant.calibration.hessian import Hessian
from grokquant.devices import CPU
from grokquant.errors import InputError
from grokquant.methods.copy import copy_quantized
from grokquant.methods.gptq import Feedback, UnusableHessian, factorize, round_gptq
from grokquant.methods.rtn import quantize_rtn
from grokquant.recipe import Rule
from grokquant.types import QTensor, TensorRef, Unit, UnitReport

# Rows looked at at once: bounds the float32 copies.
_ROWS_AT_ONCE = 2048


@dataclass
class Site:
    """The input that units share. Its Hessian and factors are made once, when first needed.

    `refusal` says why the Hessian is not to be used, `note` what was done to it.
    """

    tokens: int
    build: Callable[[], Hessian]
    refusal: str | None = None
    note: str | None = None
    _made: tuple[tuple[float, bool], Feedback] | None = None

    def feedback(self, damping: float, act_order: bool) -> Feedback:
        """Raises UnusableHessian with the reason.

        The factors take the memory of the Hessian; for others than the last it is built again.
        """
        if self.refusal:
            raise UnusableHessian(self.refusal)
        key = (damping, act_order)
        if self._made is None or self._made[0] != key:
            self._made = None
            self._made = key, factorize([self.build().H], damping, act_order)
        return self._made[1]


def round_without_data(
    unit: Unit, rule: Rule, stored: Tensor | QTensor, packing: ModuleType
) -> tuple[dict[str, Tensor], UnitReport]:
    """rtn or copy of one matrix, packed for the disk, and its report."""
    start = time.perf_counter()
    if unit.method == "copy":
        assert isinstance(stored, QTensor)
        quantized, error = copy_quantized(stored, unit.scheme), 0.0
    else:
        W = stored.dequantize() if isinstance(stored, QTensor) else stored
        quantized = quantize_rtn(W, unit.scheme, rule.scale)
        error = _errors(W, quantized)[0]
    report = UnitReport(
        name=unit.name,
        method=unit.method,
        scheme=unit.scheme,
        bits_per_weight=stored_bits(quantized) / quantized.codes.numel(),
        relative_error=error,
        seconds=time.perf_counter() - start,
    )
    return packing.pack(unit.tensor, quantized.to(CPU)), report


def round_unit(
    unit: Unit, rule: Rule, ref: TensorRef, site: Site | None, device: torch.device = CPU
) -> tuple[QTensor, UnitReport]:
    """Quantizes one matrix as planned and reports on it.

    gptq without a usable Hessian falls back to rtn, and the report names the reason. Raises
    InputError where the source holds non-finite weights.
    """
    start = time.perf_counter()
    fallback: str | None = None
    output_error: float | None = None
    relative_error, zero_rows = 0.0, 0
    if unit.method == "copy":
        quantized = copy_quantized(ref.read_quantized().to(device), unit.scheme)
    else:
        W = ref.load_on(device)
        _refuse_nonfinite(ref.name, W)
        quantized, output_error, fallback = _round(unit, rule, W, site)
        relative_error, zero_rows = _errors(W, quantized)
    note = site.note if site and unit.method == "gptq" and not fallback else None
    return quantized, UnitReport(
        name=unit.name,
        method="rtn" if fallback else unit.method,
        scheme=unit.scheme,
        bits_per_weight=stored_bits(quantized) / quantized.codes.numel(),
        relative_error=relative_error,
        output_error=output_error,
        seconds=time.perf_counter() - start,
        tokens=site.tokens if site else None,
        fallback=fallback,
        note="; ".join(filter(None, (note, zero_rows_note(zero_rows)))) or None,
    )


def stored_bits(quantized: QTensor) -> int:
    """Bits of codes, scales and zero points."""
    scheme, scales = quantized.scheme, quantized.scales
    zero_points = 0 if scheme.symmetric else scales.numel() * scheme.bits
    codes = quantized.codes.numel() * scheme.bits
    return codes + scales.numel() * scales.element_size() * 8 + zero_points


def zero_rows_note(count: int) -> str | None:
    return f"{count} rows of nothing but zeros" if count else None


def _round(
    unit: Unit, rule: Rule, W: Tensor, site: Site | None
) -> tuple[QTensor, float | None, str | None]:
    """The quantized matrix, its output error where known, and why it is not as planned."""
    if unit.method != "gptq" or site is None:
        return quantize_rtn(W, unit.scheme, rule.scale), None, None
    try:
        feedback = site.feedback(rule.damping, rule.act_order)
    except UnusableHessian as reason:
        return quantize_rtn(W, unit.scheme, rule.scale), None, str(reason)
    rounded = round_gptq(W, feedback, unit.scheme, rule.scale)
    return rounded.quantized, rounded.output_error, None


def _refuse_nonfinite(name: str, W: Tensor) -> None:
    bad = [~torch.isfinite(rows) for rows in W.split(_ROWS_AT_ONCE)]
    count = sum(int(rows.sum()) for rows in bad)
    if count:
        first = torch.cat(bad).nonzero()[0].tolist()
        raise InputError(f"{name}: {count} non-finite weights, the first at {first}")


def _errors(W: Tensor, quantized: QTensor) -> tuple[float, int]:
    """||W - Q|| / ||W||, and how many rows of W are nothing but zeros."""
    lost = total = 0.0
    zero_rows = 0
    for start in range(0, len(W), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        rows = W[part].float()
        lost += (rows - quantized.rows(part).dequantize().float()).square().sum().item()
        total += rows.square().sum().item()
        zero_rows += int((rows == 0).all(1).sum())
    return sqrt(lost / max(total, 1e-60)), zero_rows
