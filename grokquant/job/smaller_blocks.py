"""Matrices that llama.cpp's blocks of 256 input features do not divide, so that they have another
type than the rest."""

from collections import Counter
from collections.abc import Collection

from grokquant.grids import SUPER_BLOCK, block_grid
from grokquant.methods import METHODS
from grokquant.methods.method import Needs
from grokquant.types import Unit

# Of blocks of 32. Where those of 256 fit, other types of 4 bits are as small and better.
_MOSTLY_INSTEAD = "iq4_nl"
_INSTEAD = "q8_0"  # of types of 5 and 6 bits


def smaller_blocks(units: Collection[Unit]) -> list[str]:
    """A line for each number of input features and type.

    A type that matrices of the same role have although blocks of 256 fit was chosen for itself, and
    so were others than iq4_nl where no matrix of that role has blocks of 256, but for q8_0 of a
    method that calibrates: for itself it is rounded to nearest, in place of q5_k or q6_k it is not.
    """
    grids = [(unit, grid) for unit in units if (grid := block_grid(unit.scheme))]
    of_fitting = {(_role(unit), grid.name) for unit, grid in grids if _fits(unit)}
    with_large = {_role(unit) for unit, grid in grids if grid.block_columns == SUPER_BLOCK}
    counts: Counter[tuple[int, str]] = Counter()
    for unit, grid in grids:
        if _fits(unit) or (_role(unit), grid.name) in of_fitting or METHODS[unit.method].lossless:
            continue
        calibrated = grid.name == _INSTEAD and METHODS[unit.method].needs != Needs.NOTHING
        if grid.name == _MOSTLY_INSTEAD or calibrated or _role(unit) in with_large:
            counts[unit.shape[1], grid.name.upper()] += 1
    return [
        f"{count} of {len(units)} matrices have {columns} input features, which the blocks of "
        f"{SUPER_BLOCK} of K types do not divide: {name}"
        for (columns, name), count in sorted(counts.items())
    ]


def _role(unit: Unit) -> str:
    return unit.kind.partition(".")[0]


def _fits(unit: Unit) -> bool:
    return unit.shape[1] % SUPER_BLOCK == 0
