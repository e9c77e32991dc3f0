"""One option for each of many choices, so that the sum of costs is least within a size.

    min  sum of cost[u, b] x[u, b]        x[u, b] = 1 where choice u takes option b, else 0
    s.t. sum over b of x[u, b] = 1        for each u
         sum of size[u, b] x[u, b] <= budget

the multiple-choice knapsack problem, solved exactly by HiGHS.
"""

from collections.abc import Sequence
from math import gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from grokquant.errors import GrokquantError

# HiGHS stops at an absolute gap of 1e-6 between the best found and the best possible sum: costs are
# scaled so that this is far below the smallest difference that means anything.
_SCALE = 1e4


def solve(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """The number of the option that each choice takes.

    `costs` and `sizes` have a row for each choice and an entry for each of its options, at least
    one. The smallest options together must fit into `budget`. The same values give the same result.
    """
    counts = [len(row) for row in sizes]
    flat_sizes = np.concatenate([np.array(row, dtype=np.int64) for row in sizes])
    flat_costs = np.concatenate([np.array(row, dtype=np.float64) for row in costs])
    total = max(sum(max(row) for row in costs), 1e-300)
    unit = gcd(*flat_sizes.tolist())
    owner = np.repeat(np.arange(len(counts)), counts)
    places = np.arange(len(owner))
    one_each = csr_array((np.ones(len(owner)), (owner, places)))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(flat_sizes[np.newaxis] / unit, ub=budget // unit),
    ]
    found = milp(
        flat_costs / total * _SCALE,
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise GrokquantError(f"no choice of grids was found: {found.message}; this is a bug")
    starts = np.cumsum([0, *counts[:-1]])
    parts = np.split(found.x, starts[1:])
    return [int(part.argmax()) for part in parts]
