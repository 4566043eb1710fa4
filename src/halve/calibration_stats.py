"""Calibration statistics: what solvers need of a matrix's inputs, batch by batch.

There are three statistics of inputs X, from nothing to everything: `NoStatistics`,
`ColumnNorms` (the diagonal of X^T X) and `GramMatrix` (X^T X). Each is given inputs
[tokens, columns] in float32 and stores no more than it needs. `CrossGram` relates the
inputs to those in the dense model. All are compensated sums (`numerics`), so how inputs
are divided into batches has little effect, and which process adds which batch has none.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from halve.numerics.compensated_sum import CompensatedSum, Reduce, no_reduce
from halve.numerics.matmul import linear
from halve.numerics.precision import FULL_PRECISION, matmul_precision

# Tiles along a side of a Gram matrix: few, so that products are large, but enough for
# the triangle to save nearly half of the operations.
_TILES = 4
# Bounds on the rows and columns of a tile. Smaller products cost more than the triangle
# saves; the elementwise work on larger tiles does not fit the cache.
_MIN_TILE, MAX_TILE = 128, 512
# Rows and columns of a tile on CUDA, whatever the matrix. Such a product has about two
# pieces of 128 x 128 for each multiprocessor of a large GPU; a smaller one would leave
# some idle, and a larger one computes more below the diagonal.
CUDA_TILE = 2048
# The precision of products on CUDA, whatever that of the passes which yield the inputs.
_PRECISION = FULL_PRECISION
# Bytes of a number in float32.
_FLOAT = 4


def adding_nbytes(columns: int) -> int:
    """Return the bytes that adding a batch to a sum takes for a while, at most.

    A strip of `CrossGram` is computed, and `CompensatedSum.add` takes two temporaries
    of its shape. The tiles of a `GramMatrix` are smaller.
    """
    return 3 * _FLOAT * columns * min(columns, MAX_TILE)


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def max_tile(device: torch.device) -> int:
    """Return the rows of the largest tile, or strip, that is added to a sum at once."""
    return CUDA_TILE if _is_gpu(device) else MAX_TILE


def _tile(columns: int, device: torch.device) -> int:
    """Return the rows and columns of the tiles of a Gram matrix."""
    size = max(-(-columns // _TILES), _MIN_TILE, CUDA_TILE * _is_gpu(device))
    return min(size, max_tile(device), max(columns, 1))


class Statistic(ABC):
    """A statistic of the inputs that one group of matrices shares."""

    @abstractmethod
    def __init__(self, columns: int, device: torch.device) -> None: ...

    @abstractmethod
    def add(self, inputs: Tensor) -> None:
        """Add one batch of inputs, [tokens, columns], float32."""

    @abstractmethod
    def finish(self, reduce: Reduce = no_reduce) -> None:
        """Complete the sums; no input can be added afterwards.

        Args:
            reduce: Adds to a tensor the corresponding tensors of the other processes,
                all of which must call this method together.
        """

    @abstractmethod
    def add_scaled(self, other: "Statistic", scale: float) -> None:
        """Add a multiple of another statistic of its kind; both must be finished."""

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether every input was finite and no sum overflowed."""


class NoStatistics(Statistic):
    """The statistic of solvers that use the weights alone."""

    def __init__(self, columns: int, device: torch.device) -> None: ...

    def add(self, inputs: Tensor) -> None:
        """Ignore the inputs."""

    def finish(self, reduce: Reduce = no_reduce) -> None:
        """Do nothing."""

    def add_scaled(self, other: "Statistic", scale: float) -> None:
        """Do nothing."""

    def is_finite(self) -> bool:
        """Always True."""
        return True


class ColumnNorms(Statistic):
    """The sum of squares of each input feature: the diagonal of X^T X."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sum = CompensatedSum.zeros(columns, device=device)

    @property
    def squares(self) -> Tensor:
        """The sums, [columns], float32."""
        return self._sum.total()

    def add(self, inputs: Tensor) -> None:
        """Add the squares of inputs, [tokens, columns]."""
        self._sum.add(inputs.square().sum(dim=0))

    def finish(self, reduce: Reduce = no_reduce) -> None:
        """Complete the sums, with those of the other processes."""
        self._sum.high.copy_(self._sum.total(reduce))
        self._sum.low.zero_()

    def add_scaled(self, other: "Statistic", scale: float) -> None:
        """Add a multiple of the sums of other inputs."""
        assert isinstance(other, ColumnNorms), "another kind of statistic"
        self._sum.high.add_(other.squares, alpha=scale)

    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        return bool(self._sum.high.isfinite().all())


class GramMatrix(Statistic):
    """X^T X of all inputs X [tokens, columns], in float32.

    The matrix is symmetric, so only its upper triangle is computed, tile by tile: 5/8
    of the operations of the full product. Until the sum is finished, the lower triangle
    stores the rounding errors of the upper one (the `low` part of its compensated
    sums). Takes columns^2 floats, and up to columns * min(columns / 4, 512) more for
    the rounding errors of the tiles on the diagonal, which have no mirror image.

    On CUDA the tiles are larger, and those to the right of one on the diagonal are one
    product: fewer and larger kernels.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        size = _tile(columns, device)
        self._matrix = torch.zeros(columns, columns, device=device)
        self._starts = range(0, columns, size)
        self._low = torch.zeros(columns, size, device=device)
        self._joins_tiles = _is_gpu(device)

    @staticmethod
    def nbytes(columns: int, running: bool) -> int:
        """Return the bytes that the sum takes, at most.

        Args:
            columns: Number of input features.
            running: Whether batches are still added. The low parts of the tiles of the
                diagonal, which do not fit into the lower triangle, exist until then.
        """
        return _FLOAT * columns * (columns + running * min(columns, MAX_TILE))

    @staticmethod
    def operations(columns: int) -> float:
        """Return the multiplications and additions that adding one token takes."""
        return 5 / 8 * 2 * columns**2  # ten of the sixteen tiles

    def _tiles(self) -> Iterator[tuple[slice, slice, CompensatedSum]]:
        """Yield rows, columns and sum of each tile of the upper triangle."""
        for start in self._starts:
            rows = slice(start, start + self._starts.step)
            # On the diagonal the rounding errors are in a separate tensor.
            square = self._matrix[rows, rows]
            yield rows, rows, CompensatedSum(square, self._low[rows, : len(square)])
            for columns in self._right_of(rows.stop):
                # Elsewhere they are in the mirror image of the tile, transposed.
                upper, lower = self._matrix[rows, columns], self._matrix[columns, rows]
                yield rows, columns, CompensatedSum(upper, lower.T)

    def _right_of(self, first: int) -> list[slice]:
        """Return the columns of the tiles from a column on."""
        size, columns = self._starts.step, self._starts.stop
        if first >= columns:
            return []
        if self._joins_tiles:
            return [slice(first, columns)]
        return [slice(start, start + size) for start in range(first, columns, size)]

    def add(self, inputs: Tensor) -> None:
        """Add X^T X of X = `inputs`, [tokens, columns]."""
        assert self._starts or not inputs.shape[1], "the sums are finished"
        with matmul_precision(_PRECISION, inputs.device):
            for rows, columns, tile in self._tiles():
                # (X^T X)[rows, columns] = X[:, rows]^T X[:, columns].
                tile.add(inputs[:, rows].T @ inputs[:, columns])

    def finish(self, reduce: Reduce = no_reduce) -> None:
        """Complete the upper triangle, and mirror it into the lower one."""
        for rows, columns, tile in self._tiles():
            total = tile.total(reduce)
            if rows == columns:
                # A product of matrices need not be symmetric to the last bit.
                total = total.triu() + total.triu(1).T
            self._matrix[rows, columns] = total
            self._matrix[columns, rows] = total.T
        self._starts = range(0)
        self._low = torch.empty(0)

    def is_finite(self) -> bool:
        """Whether all entries are finite.

        Looks at the diagonal alone: it bounds the others, by Cauchy-Schwarz.
        """
        return bool(self._matrix.diagonal().isfinite().all())

    @property
    def matrix(self) -> Tensor:
        """X^T X, [columns, columns]; the sums must be finished."""
        assert not self._starts, "the sums are not finished"
        return self._matrix

    def add_scaled(self, other: "Statistic", scale: float) -> None:
        """Add a multiple of the Gram matrix of other inputs."""
        assert isinstance(other, GramMatrix), "another kind of statistic"
        self.matrix.add_(other.matrix, alpha=scale)

    def take(self) -> Tensor:
        """Return the full symmetric matrix, to be owned and written to by the caller.

        The sums are finished, if they were not. Nothing is left here afterwards.
        """
        self.finish()
        matrix, self._matrix = self._matrix, torch.empty(0)
        return matrix


class CrossGram:
    """W (X_dense - X)^T X for the matrices W of a group.

    X are the inputs in the model pruned so far, X_dense those in the dense model.
    `solvers.correction` computes error-corrected targets from it.

    If the group has more rows than half its columns, (X_dense - X)^T X is accumulated
    instead and multiplied by W at the end, which is less work. Takes min(rows, columns)
    * columns floats, and twice as many until the sum is finished.
    """

    @staticmethod
    def _height(rows: int, columns: int) -> int:
        """Return the rows of the sum: W's, if W is multiplied in, else the columns."""
        return rows if 2 * rows < columns else columns

    @staticmethod
    def nbytes(rows: int, columns: int, running: bool) -> int:
        """Return the bytes that the sum takes.

        Args:
            rows: Rows of all matrices of the group together.
            columns: Number of input features.
            running: Whether batches are still added. What float32 rounds off is kept
                in a second tensor of the same shape until then.
        """
        return _FLOAT * (1 + running) * CrossGram._height(rows, columns) * columns

    @staticmethod
    def operations(rows: int, columns: int) -> int:
        """Return the multiplications and additions that adding one token takes."""
        height = CrossGram._height(rows, columns)
        products = 1 if height == columns else 2  # (X_dense - X)^T X; W as well
        return products * 2 * height * columns

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """Start with empty sums.

        Args:
            weights: The dense matrices, [rows, columns] each; must not be written to.
        """
        self._weights = weights
        rows, columns = sum(map(len, weights)), weights[0].shape[1]
        height = self._height(rows, columns)
        self._joined = torch.cat(list(weights)) if height < columns else None
        self._sum = CompensatedSum.zeros(height, columns, device=weights[0].device)
        self._is_finished = False

    def _strips(self) -> Iterator[tuple[slice, CompensatedSum]]:
        """Yield slices of rows, and the sum of each."""
        size = max_tile(self._sum.high.device)
        for start in range(0, len(self._sum.high), size):
            rows = slice(start, start + size)
            yield rows, CompensatedSum(self._sum.high[rows], self._sum.low[rows])

    def add(self, inputs: Tensor, dense: Tensor) -> None:
        """Add one batch of X (`inputs`) and X_dense, each [tokens, columns]."""
        change = dense - inputs
        with matmul_precision(_PRECISION, inputs.device):
            # (X_dense - X)^T, [columns, tokens], or W (X_dense - X)^T, [rows, tokens].
            left = change.T if self._joined is None else linear(self._joined, change)
            for rows, strip in self._strips():
                strip.add(left[rows] @ inputs)

    def finish(self, reduce: Reduce = no_reduce) -> None:
        """Complete the sum, as `Statistic.finish` does."""
        if self._is_finished:
            return
        for _, strip in self._strips():
            strip.high.copy_(strip.total(reduce))
        self._sum = CompensatedSum(self._sum.high, torch.empty(0))
        self._is_finished = True

    def drift(self, index: int) -> Tensor:
        """Return W (X_dense - X)^T X for one of the matrices; finishes the sum.

        Args:
            index: The index of the matrix among `weights`.

        Returns:
            [rows, columns], float32.
        """
        self.finish()
        weight, total = self._weights[index], self._sum.high
        if self._joined is None:
            # linear(W, C.T) = W C, with C = (X_dense - X)^T X.
            return linear(weight, total.T)
        first = sum(map(len, self._weights[:index]))
        return total[first : first + len(weight)]
