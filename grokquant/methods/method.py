"""The interface of a rounding method, which recipe, plan, run and documentation read.

A method works layer by layer (`LayerRounding`). Most methods look at one matrix at a time and only
define how to round it. Methods are pure: no files, no model, no progress.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import sqrt
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from grokquant.grids import Scheme
from grokquant.threads import in_pieces, slices
from grokquant.types import QTensor, Unit

T = TypeVar("T")
# Rows rounded at once, unless a kernel has its own number: bounds the float32 copies.
TILE_ROWS = 2048
# Rows whose errors one thread adds up: it holds three float32 copies of them.
_ERROR_ROWS = 256


class Needs(Enum):
    """The data that a method needs besides the weights."""

    NOTHING = "no calibration"
    HESSIAN = "the inputs of each matrix"
    REFERENCE = "the inputs of each matrix, and every layer's states in the original model"


class UnusableHessian(ValueError):
    """The statistics of a site are unusable; the text says why."""


@dataclass(frozen=True)
class NoSettings:
    """The settings of a method without settings."""


@dataclass(frozen=True)
class Errors:
    """Sums of squares of W - Q and of W, the number of rows of W that are all zeros, and of rows
    that have become all zeros.

    All are 0 for a method that changes no weight.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    zero_rows: int = 0
    lost_rows: int = 0

    @property
    def relative(self) -> float:
        """||W - Q|| / ||W||"""
        return sqrt(self.squared_error / max(self.squared_norm, 1e-60))

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(
            self.squared_error + other.squared_error,
            self.squared_norm + other.squared_norm,
            self.zero_rows + other.zero_rows,
            self.lost_rows + other.lost_rows,
        )


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix; `output_error` is ||(W - Q) X|| / ||W X|| where it is known, and
    `held_out_error` the same for inputs that the rounding has not seen."""

    quantized: QTensor
    output_error: float | None = None
    held_out_error: float | None = None


@dataclass(frozen=True)
class Cost:
    """The cost of rounding one matrix, besides the matrix, its codes and the Hessian.

    `working_bytes` of memory. Multiply-adds of large products: `shared_products` once for all
    matrices of a site, `products` for each.
    """

    working_bytes: int = 0
    shared_products: float = 0.0
    products: float = 0.0


@dataclass(frozen=True)
class Aim:
    """What the original model makes of the tokens of a site (for Needs.REFERENCE alone).

    `weights` float32 [tokens], 1 on average, multiply the squared errors of tokens. Outputs should
    be those for the inputs `reference` of the original, in the parts of the site's own inputs, or
    `outputs` float32 [tokens, out], which may wait for other experts: what does not depend on them
    comes first.
    """

    weights: Tensor
    reference: Callable[[], Iterator[Tensor]] | None = None
    outputs: Callable[[], Tensor] | None = None


class Site(Protocol):
    """The input that some matrices share, as calibration saw it.

    `aim` is there for the matrices of experts whose sum is added to the residual, as it is or after
    a norm, and for those of attention and of shared experts; then `held_out` has inputs that are
    not among these, unless there are too few.
    """

    tokens: int
    aim: Aim | None

    @property
    def held_out(self) -> "Site | None": ...

    def inputs(self) -> Iterator[Tensor]:
        """The inputs [some tokens, in], part by part; another pass for each call."""
        ...

    def hessian(self, block: int | None, weighted: bool = False) -> list[Tensor]:
        """The float32 squares along the diagonal of X^T X, of `block` columns each; None makes one.

        With `weighted`, tokens count by the weights of the aim. They belong to the caller.
        Raises UnusableHessian with the reason.
        """
        ...

    def once(self, key: object, make: Callable[[], T]) -> T:
        """The result of `make`, cached until `key` changes."""
        ...


class Layer(Protocol):
    """A layer while it is quantized, as a method sees it.

    States are [rows, time, hidden]: `inputs` and `outputs` of the layer as it is quantized (for a
    method that revises, or Needs.REFERENCE), `reference_inputs` and `reference_outputs` of the
    original model (for Needs.REFERENCE alone). Outputs are there when the whole layer has run.

    `output_gradients` float32 [hidden, hidden] is E[g g^T] for the gradients g of predictions by
    the sum of the experts' outputs, up to a factor; there where a unit's method `needs_gradients`.
    `site_gradients` are blocks [blocks, size, size] along the diagonal of the same by outputs of
    matrices outside experts that read the same input, one above the other in the order of `units`,
    by what they read.
    """

    index: int
    units: Sequence[Unit]
    output_gradients: Tensor | None
    site_gradients: Mapping[str, Tensor]
    inputs: Tensor
    outputs: Tensor
    reference_inputs: Tensor
    reference_outputs: Tensor

    @property
    def mixture_gain(self) -> Tensor | None:
        """The gain of the norm that the sum of the experts passes, float32 [hidden], if any."""
        ...

    @property
    def attention_gain(self) -> Tensor | None:
        """The same for the outputs of attention."""
        ...

    def original(self, tensor: str) -> Tensor:
        """A tensor of the layer as the source has it, by its checkpoint name."""
        ...

    def expert_tensors(self, expert: int) -> Mapping[str, str]:
        """Checkpoint names of an expert's matrices by part: gate, up, down."""
        ...

    def slopes(self, expert: int, gate: Tensor, up: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Derivatives of hidden units by their gate and by their up, float32 [tokens, some].

        `gate` and `up` are the products of these rows of the two matrices with inputs, without
        biases.
        """
        ...

    def head_directions(self) -> Tensor:
        """The covariance of the rows of the head, times the gain of the last norm: float32 [hidden,
        hidden]."""
        ...

    def later_routers(self) -> Iterator[Tensor]:
        """The router of each later layer, times the gain of its norm: float32 [experts, hidden]."""
        ...


@dataclass(frozen=True)
class Revision:
    """The changes of a method after the whole layer has run: codes by unit name, and values of
    carried-over tensors (router, norms) by checkpoint name."""

    codes: Mapping[str, QTensor] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Method:
    """A row of `METHODS`; a new one is a subclass that overrides what differs.

    `text` describes the method in the documentation. `settings` is a frozen dataclass; its fields
    are the recipe keys of this method, with types, bounds, defaults and descriptions (pydantic's
    `Field`). `grid_keys` are the keys about the grid that it takes, with their defaults.
    """

    name: str
    text: str
    settings: type = NoSettings
    grid_keys: Mapping[str, object] = {}
    needs: Needs = Needs.NOTHING
    # False: the matrix is carried over unquantized.
    quantizes: bool = True
    # True: the grid is the source's own, and no weight changes.
    lossless: bool = False
    # True: `revise` may change rounded matrices, so they are held until the layer has run.
    revises: bool = False
    # Replaces this method if a site is unusable.
    fallback: "Method | None" = None

    def needs_gradients(self, settings: Any) -> bool:
        """Whether the original runs backward first, for the layers' `output_gradients`."""
        return False

    def refits(self, settings: Any) -> bool:
        """Whether matrices of the layer that stay in floating point are fitted to the quantized
        model's inputs."""
        return False

    def round(self, W: Tensor, scheme: Scheme, settings: Any, site: Site | None) -> Rounded:
        """Rounds the floats W [out, in] onto `scheme`. Raises UnusableHessian."""
        raise NotImplementedError

    def round_tile(
        self, tile: Tensor | QTensor, scheme: Scheme, settings: Any
    ) -> tuple[QTensor, Errors]:
        """Rounds some rows of a matrix without a site; for methods that need nothing."""
        W = dense(tile)
        quantized = self.round(W, scheme, settings, None).quantized
        return quantized, errors_of(W, quantized, torch.float64)

    def tile_rows(self, columns: int, on_cpu: bool) -> int:
        """The number of rows for one call of `round_tile`."""
        return TILE_ROWS

    def hessian_block(self, settings: Any) -> int | None:
        """Columns in each diagonal block of the Hessian; None for one block."""
        return None

    def block_columns(self, columns: int, settings: Any) -> int:
        """The same for a matrix of `columns` columns: as many as that has at most."""
        return min(self.hessian_block(settings) or columns, columns)

    @property
    def needs_site(self) -> bool:
        """Whether it must see inputs, so that a run needs calibration."""
        return self.needs is not Needs.NOTHING

    @property
    def sees_layer(self) -> bool:
        """Whether it looks at more of a layer than a matrix and its inputs, so that one process
        must round the whole layer."""
        own = type(self).begin_layer is not Method.begin_layer
        return own or self.revises or self.needs is Needs.REFERENCE

    def cost(self, rows: int, columns: int, settings: Any) -> Cost:
        """The cost of rounding W [rows, columns]; by default float32 copies of some tiles."""
        return Cost(working_bytes=8 * min(rows, TILE_ROWS) * columns * torch.float32.itemsize)

    def begin_layer(self, layer: Layer) -> "LayerRounding":
        """The object that rounds the units of one layer."""
        return LayerRounding(self, layer)


class LayerRounding:
    """A method at work on one layer. Units come in the order of the computation."""

    def __init__(self, method: Method, layer: Layer) -> None:
        self.method = method
        self.layer = layer

    def round(self, unit: Unit, W: Tensor, site: Site | None) -> Rounded:
        """Rounds one matrix; the layer continues with the result. Raises UnusableHessian."""
        return self.method.round(W, unit.scheme, unit.settings, site)

    def revise(self) -> Revision:
        """Changes rounded matrices after the layer has run; for methods with `revises`."""
        return Revision()


def dense(W: Tensor | QTensor) -> Tensor:
    """W as float32 weights."""
    return (W.dequantize() if isinstance(W, QTensor) else W).float()


def errors_of(W: Tensor, quantized: QTensor, dtype: torch.dtype = torch.float32) -> Errors:
    """The errors of rounding W [out, in], computed tile by tile with sums in `dtype`."""

    def errors(part: slice) -> Errors:
        rows = W[part].float()
        rounded = quantized.rows(part).dequantize().float()
        lost = rows - rounded
        was_zero = rows.abs().amax(1) == 0  # three times as fast as all(rows == 0)
        is_zero = rounded.abs().amax(1) == 0
        return Errors(
            lost.square().sum(dtype=dtype).item(),
            rows.square().sum(dtype=dtype).item(),
            int(was_zero.sum()),
            int((is_zero & ~was_zero).sum()),
        )

    return sum(in_pieces(errors, slices(0, len(W), _ERROR_ROWS)), Errors())
