"""Targets of rounding: the weights that give, for the quantized model's inputs, what is wanted.

With inputs x and wanted outputs v of tokens that count w, and H = sum of w x x^T,

    W* = W + S (H + ridge)^-1        S = sum of w (v - W x) x^T        [out, in]

minimizes sum of w |v - W* x|^2 + ridge |W* - W|^2. Rounding that lowers tr(E H E^T), E = What - W*,
then lowers sum of w |v - What x|^2, but for the ridge (GPTAQ, arXiv 2504.02692; QEP, arXiv
2504.09629; Qronos, arXiv 2505.11695).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from grokquant.methods.gptq import Factor
from grokquant.methods.method import Aim, Site
from grokquant.threads import in_pieces, slices

# Rows of a product that one thread computes.
PIECE = 256
# Steps of Lanczos: for ridges between a tenth and seven times that of the factors the solutions err
# by a percent.
_STEPS = 7
# Rows of a piece of them: few, since few rows are solved for.
_STEP_PIECE = 32
# Nothing is divided by less.
_TINY = 1e-30


def weighted(inputs: Callable[[], Iterator[Tensor]], aim: Aim) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of inputs in float32 [some tokens, in] with the weights of their tokens [some, 1]."""
    start = 0
    for X in inputs():
        weights = aim.weights[start : start + len(X)]
        start += len(X)
        yield X.float(), weights.to(X.device).unsqueeze(1)


def missing_outputs(W: Tensor, site: Site, aim: Aim) -> Tensor:
    """S float32 [out, in] for W float32 [out, in] where the aim has the wanted outputs."""
    assert aim.outputs is not None
    outputs = aim.outputs()
    S = torch.zeros_like(W)
    start = 0
    for X, weights in weighted(site.inputs, aim):
        wanted = outputs[start : start + len(X)].to(X.device)
        start += len(X)

        def add(rows: slice, X: Tensor, weights: Tensor, wanted: Tensor) -> None:
            missing = (wanted[:, rows] - X @ W[rows].T) * weights
            S[rows].addmm_(missing.T, X)

        work = partial(add, X=X, weights=weights, wanted=wanted)
        in_pieces(work, slices(0, len(W), PIECE))
    return S


def moved_inputs(site: Site, aim: Aim) -> Tensor:
    """Sum of w (x_f - x) x^T, float32 [in, in], where v = W x_f for inputs x_f of the original.

    S is W times that, for all W that read the site.
    """
    assert aim.reference is not None
    total = torch.zeros(0)
    for (X, weights), reference in zip(weighted(site.inputs, aim), aim.reference(), strict=True):
        moved = (reference.float() - X) * weights
        if not len(total):
            total = X.new_zeros(X.shape[1], X.shape[1])

        def add(rows: slice, X: Tensor, moved: Tensor, total: Tensor) -> None:
            total[rows].addmm_(moved[:, rows].T, X)

        work = partial(add, X=X, moved=moved, total=total)
        in_pieces(work, slices(0, len(total), PIECE))
    return total


def missed(target: Tensor, W: Tensor, rows: Tensor, site: Site, aim: Aim) -> float:
    """Sum of w |v - W* x|^2 over the tokens of a site, for some `rows` of a matrix.

    `target` is W* and `W` the stored matrix, both float32 [some, in].
    """
    total = 0.0
    start = 0
    references = aim.reference() if aim.reference else None
    for X, weights in weighted(site.inputs, aim):
        if references:
            given = next(references).float()
        else:
            assert aim.outputs is not None
            given = aim.outputs()[start : start + len(X), rows].to(X.device)
        start += len(X)

        def miss(
            part: slice, X: Tensor = X, weights: Tensor = weights, given: Tensor = given
        ) -> float:
            wanted = given[part] @ W.T if references else given[part]
            lost = (wanted - X[part] @ target.T).square_() * weights[part]
            return lost.sum(dtype=torch.float64).item()

        total += sum(in_pieces(miss, slices(0, len(X), PIECE)))
    return total


def times(W: Tensor, A: Tensor) -> Tensor:
    """W A [out, in], some rows a piece."""
    return torch.cat(in_pieces(lambda rows: W[rows] @ A, slices(0, len(W), PIECE)))


def solve_(S: Tensor, factor: Factor) -> Tensor:
    """S (H + ridge I)^-1 [out, in] in place of S, for H + ridge I = F diag(D) F^T as factorised."""
    F = factor.F

    def solve(rows: slice) -> None:
        Y = S[rows][:, factor.columns]
        Y = torch.linalg.solve_triangular(F.T, Y, upper=False, left=False, unitriangular=True)
        Y /= factor.D
        Y = torch.linalg.solve_triangular(F, Y, upper=True, left=False, unitriangular=True)
        S[rows, factor.columns] = Y

    in_pieces(solve, slices(0, len(S), PIECE))
    return S


def solve_for(S: Tensor, factor: Factor, ridges: Sequence[float]) -> list[Tensor]:
    """S (H + ridge I)^-1 [out, in] for each ridge, about, by the factors of H with one of them.

    With A = (H + shift I)^-1 that is S A (I + (ridge - shift) A)^-1, a smooth function of A, which
    a few steps of Lanczos from each row of S give for all ridges at once.
    """

    def solve(rows: slice) -> Tensor:
        size = S[rows].norm(dim=1, keepdim=True)
        V, T = _lanczos(S[rows] / size.clamp(min=_TINY), factor)
        one = torch.eye(_STEPS, dtype=T.dtype, device=T.device)
        found = []
        for ridge in ridges:
            inverse = torch.linalg.solve(one + (ridge - factor.shift) * T, one[:, :1])
            shares = (T @ inverse).to(S.dtype)  # (rows, steps, 1)
            found.append((V * shares).sum(1) * size)
        return torch.stack(found)  # (ridges, rows, in)

    pieces = in_pieces(solve, slices(0, len(S), _STEP_PIECE), S.device)
    return list(torch.cat(pieces, 1))


def _lanczos(v: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases V [rows, steps, in], each from a row of v on, and A in them, T float64
    [rows, steps, steps]."""
    V = torch.zeros(len(v), _STEPS + 1, v.shape[1], device=v.device)
    T = torch.zeros(len(v), _STEPS + 1, _STEPS, dtype=torch.float64, device=v.device)
    V[:, 0] = v
    for step in range(_STEPS):
        moved = solve_(V[:, step].clone(), factor)
        shares = torch.bmm(V, moved.unsqueeze(2))
        moved -= torch.bmm(shares.mT, V).squeeze(1)
        left = moved.norm(dim=1, keepdim=True)
        T[:, :, step] = shares.squeeze(2)
        T[:, step + 1, step] = left.squeeze(1)
        V[:, step + 1] = moved / left.clamp(min=_TINY)
    return V[:, :-1], T[:, :-1]
