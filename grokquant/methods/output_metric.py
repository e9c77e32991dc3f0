"""What an error of a layer's output costs: the metric G of two-sided rounding, tr(G E H E^T).

M [hidden, hidden] is the metric of the sum of the experts' outputs. An error matters as far as it
changes predictions; as far as a router of a later layer reads it, since it then changes which
experts a token gets; and everywhere a little:

    M = P + .1 * sum over later layers of cov(router * gain) + .05 I

each with a mean diagonal of 1, where P = cov(head * gain), with the gain of the last norm. These
are covariances of rows, since logits may all move alike. Where a norm follows the sum, its gain
multiplies all these rows. With a backward pass of the original (`streaming.gradients`; YAQA, arXiv
2505.22988), P is E[g g^T] for gradients g of predictions and of routers, whose term goes.

down gives the sum, so its metric is M. Errors of gate and up reach the sum through the derivatives
a' of the hidden units and through down [hidden, inner]:

    G = (down^T M down, for gate and up alike) * sum over tokens of w a' a'^T

Only blocks of 8 hidden units along its diagonal are kept, each with its gate and its up rows; that
loses a few percent of the gain, and the whole would be [2 inner, 2 inner].
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grokquant.methods.method import Aim, Layer
from grokquant.methods.targets import PIECE, weighted
from grokquant.threads import alone, in_pieces, slices

# The weights of all directions and of the routers', next to those of the head.
_ALL = 0.05
_ROUTERS = 0.1
# Added to the diagonal of a metric, as a share of its mean.
_DAMPING = 0.1
# Tokens of an expert, evenly spread, whose derivatives make its small blocks.
_SLOPE_TOKENS = 1024
# Hidden units in a block of the metric of gate and up.
_UNITS = 8


def units_in_block(inner: int) -> int:
    """The number of hidden units in a block, all blocks being of one size."""
    return next(size for size in range(_UNITS, 0, -1) if inner % size == 0)


def metric_of_sum(layer: Layer, hidden: int, gradients: bool) -> Tensor:
    """M float32 [hidden, hidden] of the sum of the experts' outputs, damped.

    By `gradients` of predictions, or by the head.
    """
    if gradients:
        assert layer.output_gradients is not None
        predictions = layer.output_gradients
        return alone(lambda: _metric(predictions, iter(()), torch.ones(hidden)))
    return metric_of_states(layer, hidden, layer.mixture_gain)


def metric_of_states(layer: Layer, hidden: int, gain_after: Tensor | None) -> Tensor:
    """M float32 [hidden, hidden] by the head, of what is added to the residual after a norm with
    a gain, if any."""
    gain = torch.ones(hidden) if gain_after is None else gain_after
    predictions = layer.head_directions() * gain * gain.unsqueeze(1)
    return alone(lambda: _metric(predictions, layer.later_routers(), gain))


def metric_of_site(moments: Tensor) -> Tensor:
    """G float32 [blocks, size, size] of matrices one above the other, damped, by `moments`: the
    same of E[g g^T] for gradients g by their outputs."""

    def damped() -> Tensor:
        means = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        G = torch.where(means > 0, moments / means, 0.0)  # those of k are far smaller than of v
        G.diagonal(dim1=-2, dim2=-1).add_(_ALL + _DAMPING)
        return G

    return alone(damped)


def metric_of_inner(M: Tensor, down: Tensor, moments: Tensor) -> Tensor:
    """G float32 [blocks, B, B] of gate and up, or of one of them, interleaved; damped.

    `moments` [blocks, members, size, members, size] are sums of products of derivatives by the
    members; B = members * size.
    """
    blocks, _, size = moments.shape[:3]
    columns = down.T.unflatten(0, (blocks, size))  # (blocks, size, hidden)

    def weigh(part: slice) -> Tensor:
        D = columns[part]
        reached = (D.flatten(0, 1) @ M).view_as(D) @ D.mT  # (some, size, size)
        G = moments[part] * reached[:, None, :, None, :]
        return G.flatten(3, 4).flatten(1, 2)

    parts = in_pieces(weigh, slices(0, blocks, PIECE // size))
    return alone(lambda: _damped(torch.cat(parts)))


def slope_moments(
    layer: Layer, expert: int, gate: Tensor, up: Tensor, aim: Aim, size: int
) -> Tensor:
    """Sum over some tokens of w a' a'^T in blocks of hidden units, [blocks, 2, size, 2, size].

    a' are the derivatives of hidden units by gate and up at the original's inputs.
    """
    assert aim.reference is not None
    inner = len(gate)
    moments = torch.zeros(inner // size, 2, size, 2, size)
    stride = -(-len(aim.weights) // _SLOPE_TOKENS)
    for every_X, every_weight in weighted(aim.reference, aim):
        X = every_X[::stride]
        weights = every_weight[::stride]

        def add(units: slice, X: Tensor = X, weights: Tensor = weights) -> None:
            slopes = layer.slopes(expert, X @ gate[units].T, X @ up[units].T, units)
            both = torch.stack(slopes).unflatten(2, (-1, size))  # (2, tokens, blocks, size)
            columns = both.permute(2, 1, 0, 3).flatten(2)  # (blocks, tokens, 2 * size)
            products = columns.mT @ (columns * weights)
            blocks = slice(units.start // size, units.stop // size)
            moments[blocks] += products.view_as(moments[blocks])

        in_pieces(add, slices(0, inner, PIECE // size * size))
    return moments


def interleave(matrices: Sequence[Tensor], size: int) -> Tensor:
    """Matrices [out, ...] as one, so that a block holds the same rows of each:

    gate 0..7 | up 0..7 | gate 8..15 | up 8..15 | ...
    """
    return torch.stack([W.unflatten(0, (-1, size)) for W in matrices], 1).flatten(0, 2)


def part_of(interleaved: Tensor, place: int, members: int, size: int) -> Tensor:
    """One of the `members` matrices of `interleave`."""
    return interleaved.unflatten(0, (-1, members, size))[:, place].flatten(0, 1).contiguous()


def _metric(predictions: Tensor, routers: Iterator[Tensor], gain: Tensor) -> Tensor:
    M = _normalized(predictions)
    M.diagonal().add_(_ALL)
    directions = torch.zeros_like(M)
    for router in routers:
        rows = (router - router.mean(0)) * gain
        directions += _normalized(rows.T @ rows)
    if directions.any():  # the last layer has no later routers
        M += _ROUTERS * _normalized(directions)
    return _damped(M)


def _normalized(G: Tensor) -> Tensor:
    """G [..., n, n] with a mean diagonal of 1, or zeros."""
    mean = G.diagonal(dim1=-2, dim2=-1).mean()
    return G / mean if mean > 0 else torch.zeros_like(G)


def _damped(G: Tensor) -> Tensor:
    G = _normalized(G)
    G.diagonal(dim1=-2, dim2=-1).add_(_DAMPING)
    return G
