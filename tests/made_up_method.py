"""A method that nobody ships: a file, and the row in the table below. Run as the command is.

It rounds towards zero, by a share of a step that its own key sets. `--with-data` makes it ask for
the inputs of each matrix, `--die-after N` kills the run after N matrices.
"""

import os
import sys
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.methods import METHODS
from grokquant.methods.method import Cost, Method, Needs, Rounded, Site
from grokquant.methods.rtn import GRID_KEYS, RTN, ScaleSettings
from grokquant.methods.scales import quantize_nearest, search_scales


@dataclass(frozen=True)
class Settings(ScaleSettings):
    reluctance: Annotated[float, Field(ge=0, le=1, description="A share of a step.")] = 0.25


class TowardsZero(Method):
    name = "towards-zero"
    text = "rounds towards zero"
    settings = Settings
    grid_keys = GRID_KEYS
    fallback = RTN

    def round(self, W: Tensor, scheme: Scheme, settings: Settings, site: Site | None) -> Rounded:
        scales, zero_points = search_scales(W, scheme, settings.scale)
        steps = scales.float().repeat_interleave(W.shape[1] // scales.shape[1], dim=1)
        smaller = W.abs() - settings.reluctance * steps.abs()
        if site is not None:
            site.once("trace", lambda: site.hessian(None)[0].trace())
        towards_zero = W.sign() * smaller.clamp(min=0)
        return Rounded(quantize_nearest(towards_zero, scales, zero_points, scheme))

    def cost(self, rows: int, columns: int, settings: Settings) -> Cost:
        return Cost(working_bytes=12 * rows * columns, products=0, shared_products=columns**3)


class WithData(TowardsZero):
    needs = Needs.HESSIAN


def main() -> None:
    with_data = "--with-data" in sys.argv
    METHODS["towards-zero"] = WithData() if with_data else TowardsZero()  # the row
    from grokquant.cli import main as command
    from grokquant.job.pipeline import Run

    arguments = [argument for argument in sys.argv[1:] if argument != "--with-data"]
    if "--die-after" in arguments:
        place = arguments.index("--die-after")
        left = int(arguments[place + 1])
        del arguments[place : place + 2]
        emit = Run.emit

        def emit_or_die(run: Run, *given: object) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                run.writer.drain()
                os._exit(9)
            emit(run, *given)  # type: ignore[arg-type]

        Run.emit = emit_or_die  # type: ignore[method-assign,assignment]
    command(arguments)


if __name__ == "__main__":
    main()
