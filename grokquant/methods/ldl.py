"""H = F D F^T in place, F unit upper triangular: the one factorisation that GPTQ needs.

The Hessian of a wide matrix fills a good part of a machine's memory, so nothing here makes a second
one. The factorisation runs from the last panel of columns to the first and writes to the upper
triangle only; the lower triangle and the saved diagonal still hold H.

    H = | above above |   1. corner: H minus the products of the rows of R to its right, then
        |   .  corner |      a small Cholesky factorisation
        |   .    .    |   2. above: the same products off, then solved by the corner's factor

A row of `above` needs no other row of it, so that threads share them in pieces.
"""

import torch
from torch import Tensor

from grokquant.threads import in_pieces, slices

# Columns eliminated at once: wide enough for fast matrix products, narrow for the rest.
_PANEL = 512
# Rows of a product that one thread of a CPU makes: fast, and few enough for many threads.
_PIECE = 256
# Rows, then columns, that are permuted at once: they fit into the cache.
_AT_ONCE = 64


def permute_(H: Tensor, order: Tensor) -> None:
    """Makes H [n, n] H[order][:, order], in place. `order` is int64 [n]."""
    for rows in H.split(_AT_ONCE):
        rows.copy_(rows[:, order])
    for columns in H.split(_AT_ONCE, dim=1):
        columns.copy_(columns[order])


def factorize_(H: Tensor, shift: float) -> Tensor | None:
    """Factorises the symmetric H [n, n] + shift I.

    Leaves F above the diagonal of H and returns D [n]; with the diagonal that H had, `restore_`
    makes it H again. If the sum is not positive definite, restores H and returns None.
    """
    diagonal = H.diagonal().clone()
    H.diagonal().add_(shift)
    if not _cholesky_(H):
        restore_(H, diagonal)
        return None
    # R R^T = F D F^T with F = R diag(R)^-1 and D = diag(R)^2.
    pivots = H.diagonal().clone()
    for start, stop in _panels(H):
        H[:start, start:stop].div_(pivots[start:stop])
        corner = H[start:stop, start:stop]
        corner.copy_(corner.tril(-1) + corner.triu() / pivots[start:stop])
    return pivots.square_()


def _cholesky_(H: Tensor) -> bool:
    """Writes R of H = R R^T over H's upper triangle. False if H is not positive definite."""
    return all(_eliminate_(H, *panel) for panel in reversed(_panels(H)))


def _eliminate_(H: Tensor, start: int, stop: int) -> bool:
    """Writes the columns of R from `start` to before `stop`; those to their right are there."""
    columns = slice(start, stop)
    right = H[columns, stop:]  # the finished part of these rows of R (panel, n - stop)
    size = _PIECE if H.device.type == "cpu" else len(H)

    def left_over(rows: slice) -> Tensor:  # (rows, panel)
        return torch.addmm(H[rows, columns], H[rows, stop:], right.T, alpha=-1)

    corner = torch.cat(in_pieces(left_over, slices(start, stop, size), H.device))
    # Reversed in both directions, the usual lower factor becomes an upper one.
    ((L, failed),) = in_pieces(torch.linalg.cholesky_ex, [corner.flip(0, 1)], H.device)
    if failed:
        return False
    R = L.flip(0, 1)
    H[columns, columns].tril_(-1).add_(R)

    def solve(rows: slice) -> None:
        above = left_over(rows)
        H[rows, columns] = torch.linalg.solve_triangular(R.T, above, upper=False, left=False)

    in_pieces(solve, slices(0, start, size), H.device)
    return True


def restore_(H: Tensor, diagonal: Tensor) -> None:
    """Rebuilds the symmetric H from its strict lower triangle, which a factorisation leaves as it
    was, and the saved diagonal."""
    for start, stop in _panels(H):
        H[:start, start:stop] = H[start:stop, :start].T
        corner = H[start:stop, start:stop].tril_(-1)
        corner.add_(corner.T.clone())
    H.diagonal().copy_(diagonal)


def _panels(H: Tensor) -> list[tuple[int, int]]:
    """(start, stop) of each panel of columns."""
    return [(part.start, part.stop) for part in slices(0, len(H), _PANEL)]
