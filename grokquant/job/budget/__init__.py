"""Estimates of the memory and time of a run, before it begins."""

from dataclasses import dataclass

from grokquant.job.budget.memory import Step, peak_step, resident_bytes
from grokquant.job.budget.timing import expected_times
from grokquant.job.plan import Plan

_THREADS = 1 << 26  # what the allocator keeps for the threads of a run


@dataclass(frozen=True)
class Budget:
    """`peak_bytes` of memory, reached at the step `peak`; `times` in seconds on this machine, by
    step, beyond what a run does beside its other steps."""

    peak: Step
    peak_bytes: int
    times: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.times.values())


def budget_of(plan: Plan) -> Budget:
    """Probes this machine for a few seconds with samples of the source and the calibration text."""
    step = peak_step(plan)
    times = expected_times(plan)
    # The probe has loaded the kernels that a run loads.
    return Budget(step, resident_bytes() + step.bytes + _THREADS, times)
