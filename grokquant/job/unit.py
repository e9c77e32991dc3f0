"""Rounding one unit by its method, and what there is to say about it afterwards."""

import time
from math import isfinite, prod, sqrt
from types import ModuleType

import torch
from torch import Tensor

from grokquant.calibration.site import Site
from grokquant.devices import CPU
from grokquant.errors import InputError
from grokquant.grids import Scheme
from grokquant.job.fused import round_and_pack, too_large
from grokquant.methods.copy import InexactScale, copy_quantized
from grokquant.methods.gptq import UnusableHessian, round_gptq
from grokquant.methods.rtn import quantize_rtn
from grokquant.recipe import Rule
from grokquant.types import QTensor, TensorRef, Unit, UnitReport

# Rows looked at at once: bounds the float32 copies.
_ROWS_AT_ONCE = 2048


def round_without_data(
    unit: Unit, rule: Rule, stored: Tensor | QTensor, packing: ModuleType
) -> tuple[dict[str, Tensor], UnitReport]:
    """rtn or copy of one matrix, packed for the disk, and its report. Raises InputError."""
    start = time.perf_counter()
    parts, errors = round_and_pack(
        unit.tensor, stored, unit.method, unit.scheme, rule.scale, packing
    )
    return parts, UnitReport(
        name=unit.name,
        method=unit.method,
        scheme=unit.scheme,
        bits_per_weight=stored_bits(unit.scheme, unit.shape) / prod(unit.shape),
        relative_error=errors.relative,
        seconds=time.perf_counter() - start,
        note=_zero_rows_note(errors.zero_rows),
    )


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
        quantized = _copy(ref, unit.scheme, device)
    else:
        W = ref.load_on(device)
        _refuse_nonfinite(ref.name, W)
        quantized, output_error, fallback = _round(unit, rule, W, site)
        relative_error, zero_rows = _errors(W, quantized)
        if not isfinite(relative_error):
            raise too_large(ref.name, unit.scheme, W.abs().max().item())
    note = site.note if site and unit.method == "gptq" and not fallback else None
    return quantized, UnitReport(
        name=unit.name,
        method="rtn" if fallback else unit.method,
        scheme=unit.scheme,
        bits_per_weight=stored_bits(unit.scheme, unit.shape) / prod(unit.shape),
        relative_error=relative_error,
        output_error=output_error,
        seconds=time.perf_counter() - start,
        tokens=site.tokens if site else None,
        fallback=fallback,
        note="; ".join(filter(None, (note, _zero_rows_note(zero_rows)))) or None,
    )


def stored_bits(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Bits of codes, scales and zero points or offsets of a matrix [out, in]."""
    return prod(shape) * scheme.bits + shape[0] * scheme.groups(shape[1]) * scheme.group_bits


def _copy(ref: TensorRef, scheme: Scheme, device: torch.device) -> QTensor:
    try:
        return copy_quantized(ref.read_quantized().to(device), scheme)
    except InexactScale as reason:
        raise InputError(f"{ref.name}: copy is not lossless, {reason}") from None


def _zero_rows_note(count: int) -> str | None:
    return f"{count} rows of nothing but zeros" if count else None


def _round(
    unit: Unit, rule: Rule, W: Tensor, site: Site | None
) -> tuple[QTensor, float | None, str | None]:
    """The quantized matrix, its output error where known, and why it is not as planned."""
    if unit.method != "gptq" or site is None:
        return quantize_rtn(W, unit.scheme, rule.scale), None, None
    try:
        rounded = round_gptq(W, site.feedback(rule), unit.scheme, rule.scale)
        if not isfinite(rounded.output_error):
            raise UnusableHessian("its outputs are too large to be compared")
    except UnusableHessian as reason:
        return quantize_rtn(W, unit.scheme, rule.scale), None, str(reason)
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
