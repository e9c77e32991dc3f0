"""Rounds one unit by its method and reports on it."""

from math import isfinite, prod
from time import perf_counter

import torch
from torch import Tensor

from grokquant.calibration.site import Site
from grokquant.devices import CPU
from grokquant.formats import Format
from grokquant.grids import Scheme
from grokquant.job.fused import not_finite, round_and_pack, round_whole
from grokquant.methods import METHODS
from grokquant.methods.method import (
    Errors,
    LayerRounding,
    Rounded,
    UnusableHessian,
    errors_of,
)
from grokquant.types import QTensor, TensorRef, Unit, UnitReport


def round_without_data(
    unit: Unit, stored: Tensor | QTensor, output_format: Format
) -> tuple[dict[str, Tensor], UnitReport]:
    """Rounds and packs one matrix by a method without calibration; returns it with its report.

    Raises InputError for weights that cannot be rounded.
    """
    start = perf_counter()
    parts, errors = round_and_pack(unit, stored, output_format)
    return parts, report_of(unit, errors, start)


def round_unit(
    unit: Unit,
    ref: TensorRef,
    rounding: LayerRounding,
    site: Site | None,
    device: torch.device = CPU,
) -> tuple[QTensor, UnitReport]:
    """Rounds one matrix of a layer during calibration; returns it with its report.

    Without a usable Hessian the method's fallback is used, and the report gives the reason.
    Raises InputError for weights that cannot be rounded.
    """
    start = perf_counter()
    tokens = site.tokens if site else None
    if not METHODS[unit.method].needs_site:
        quantized, errors = round_whole(unit, ref.load().to(device))
        return quantized, report_of(unit, errors, start, tokens=tokens)
    W = ref.load_on(device)
    # As quick as reading: one value that is not finite makes one of the two so.
    if not all(extreme.isfinite() for extreme in W.aminmax()):
        raise not_finite(ref.name, W, unit.scheme)
    fallback: str | None = None
    try:
        rounded = rounding.round(unit, W, site)
    except UnusableHessian as reason:
        fallback = str(reason)
        rounded = _fall_back(unit, W)
    errors = errors_of(W, rounded.quantized)
    if not isfinite(errors.relative):
        raise not_finite(ref.name, W, unit.scheme)
    return rounded.quantized, report_of(
        unit,
        errors,
        start,
        tokens=tokens,
        output_error=rounded.output_error,
        held_out_error=rounded.held_out_error,
        fallback=fallback,
        note=site.note if site and not fallback else None,
    )


def report_of(
    unit: Unit,
    errors: Errors,
    start: float,
    tokens: int | None = None,
    output_error: float | None = None,
    fallback: str | None = None,
    note: str | None = None,
    held_out_error: float | None = None,
) -> UnitReport:
    """The report of a unit whose rounding began at `start` (of perf_counter)."""
    method = METHODS[unit.method]
    if fallback and method.fallback:
        method = method.fallback
    zeros = f"{errors.zero_rows} rows of nothing but zeros" if errors.zero_rows else None
    return UnitReport(
        name=unit.name,
        method=method.name,
        scheme=unit.scheme,
        bits_per_weight=stored_bits(unit.scheme, unit.shape) / prod(unit.shape),
        relative_error=errors.relative,
        output_error=output_error,
        held_out_error=held_out_error,
        seconds=perf_counter() - start,
        tokens=tokens,
        fallback=fallback,
        note="; ".join(filter(None, (note, zeros))) or None,
        lost_rows=errors.lost_rows,
    )


def stored_bits(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Bits of codes, scales and zero points or offsets of a matrix [out, in]."""
    return prod(shape) * scheme.bits + shape[0] * scheme.groups(shape[1]) * scheme.group_bits


def _fall_back(unit: Unit, W: Tensor) -> Rounded:
    """Rounds the unit by the fallback of its method, with the same settings."""
    fallback = METHODS[unit.method].fallback
    assert fallback is not None, f"{unit.method} needs data and has no fallback"
    return fallback.round(W, unit.scheme, unit.settings, None)
