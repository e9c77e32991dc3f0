"""H = F D F^T in place, F unit upper triangular: the one factorisation that GPTQ needs.

The Hessian of a wide matrix fills a good part of a machine, so nothing here makes a second one. The
factorisation runs from the last column to the first and writes to the upper triangle only; until it
has succeeded, the lower one and the saved diagonal still hold H.
"""

import torch
from torch import Tensor

# Columns eliminated at once: wide enough for fast matrix products, narrow for the rest.
_PANEL = 512
# Rows whose columns are permuted at once: they fit into the cache.
_ROWS_AT_ONCE = 64


def permute_(H: Tensor, order: Tensor) -> None:
    """Makes H [n, n] H[order][:, order], in place."""
    for rows in H.split(_ROWS_AT_ONCE):
        rows.copy_(rows.gather(1, order.expand(len(rows), -1)))
    source, moved = order.tolist(), [False] * len(order)
    for first in range(len(source)):
        if moved[first] or source[first] == first:
            continue
        saved, row = H[first].clone(), first
        while source[row] != first:
            H[row] = H[source[row]]
            moved[row], row = True, source[row]
        H[row], moved[row] = saved, True


def factorize_(H: Tensor, shift: float) -> Tensor | None:
    """Factorises the symmetric H [n, n] + shift I.

    Leaves F above the diagonal and returns D [n]. Where the sum is not positive definite, restores
    H and returns None.
    """
    diagonal = H.diagonal().clone()
    H.diagonal().add_(shift)
    if not _cholesky_(H):
        _restore_(H, diagonal)
        return None
    pivots = H.diagonal().clone()
    for start, stop in _panels(H):
        H[:stop, start:stop].div_(pivots[start:stop])
    return pivots.square_()


def _cholesky_(H: Tensor) -> bool:
    """H = R R^T, R over the upper triangle of H. False where H is not positive definite."""
    for start, stop in reversed(_panels(H)):
        right = H[start:stop, stop:]  # rows of R that are done
        corner = torch.addmm(H[start:stop, start:stop], right, right.T, alpha=-1)
        # Reversed in both directions, the usual lower factor becomes an upper one.
        L, failed = torch.linalg.cholesky_ex(corner.flip(0, 1))
        if failed:
            return False
        R = L.flip(0, 1)
        H[start:stop, start:stop].tril_(-1).add_(R)
        above = H[:start, start:stop].addmm_(H[:start, stop:], right.T, alpha=-1)
        above.copy_(torch.linalg.solve_triangular(R.T, above, upper=False, left=False))
    return True


def _restore_(H: Tensor, diagonal: Tensor) -> None:
    """The symmetric matrix whose strict lower triangle H still holds."""
    for start, stop in _panels(H):
        H[:start, start:stop] = H[start:stop, :start].T
        corner = H[start:stop, start:stop].tril_(-1)
        corner.add_(corner.T.clone())
    H.diagonal().copy_(diagonal)


def _panels(H: Tensor) -> list[tuple[int, int]]:
    return [(start, min(start + _PANEL, len(H))) for start in range(0, len(H), _PANEL)]
