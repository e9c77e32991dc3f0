"""What a run will take of disk, memory and time, told before it begins."""

from dataclasses import dataclass

from grokquant.budget.memory import Step, peak_step, resident_bytes
from grokquant.budget.timing import expected_seconds
from grokquant.plan import Plan


@dataclass(frozen=True)
class Budget:
    """`peak_bytes` of memory, reached at the step `peak`; `seconds` of time on this machine."""

    peak: Step
    peak_bytes: int
    seconds: float


def budget_of(plan: Plan) -> Budget:
    """Probes this machine for some seconds; nothing of the source but a sample is read."""
    seconds = expected_seconds(plan)
    step = peak_step(plan)
    return Budget(step, resident_bytes() + step.bytes, seconds)
