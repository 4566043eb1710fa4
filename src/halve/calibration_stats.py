"""What a solver needs to know of a matrix's inputs, gathered batch by batch.

Three kinds, from nothing to everything: `NoStatistics`, `ColumnNorms`, `GramMatrix`. Each takes
inputs [tokens, columns] in float32 and keeps no more than it must. `CrossGram` is what has
become of the inputs since they were a dense model's. All add up more precisely than
float32 does (`compensated_sum`), so that it matters little how inputs are cut into batches and not
at all who takes in which batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from halve.numerics.compensated_sum import CompensatedSum, Reduce, no_reduce
from halve.numerics.matmul import linear

# Tiles along a side: few enough for large products, enough to save nearly half.
_TILES = 4
# Rows and columns of a tile: smaller products cost more than the triangle saves; what
# is done with larger ones leaves the cache.
_LEAST_TILE, MAX_TILE = 128, 512
# Bytes of a number in float32.
_FLOAT = 4


def adding_nbytes(columns: int) -> int:
    """Return the bytes that adding a batch to a sum takes for a while, at most.

    A strip of `CrossGram` is computed, and `CompensatedSum.add` takes two temporaries
    of its shape. The tiles of a `GramMatrix` are smaller.
    """
    return 3 * _FLOAT * columns * min(columns, MAX_TILE)


class Statistic(ABC):
    """A running summary of the inputs of one group of matrices."""

    @abstractmethod
    def __init__(self, columns: int, device: torch.device) -> None: ...

    @classmethod
    @abstractmethod
    def of(cls, gram: Tensor) -> Self:
        """Return the statistic of inputs whose X^T X is known; they share memory."""

    @abstractmethod
    def add(self, inputs: Tensor) -> None:
        """Take in one batch of inputs, [tokens, columns]."""

    @abstractmethod
    def finish(self, reduce: Reduce = no_reduce) -> None:
        """Complete the sums; nothing can be added afterwards.

        Args:
            reduce: Adds to a tensor what other processes have in its place. All of them
                must finish together.
        """

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether every input so far was finite and no sum overflowed."""


class NoStatistics(Statistic):
    """For solvers that look at weights alone."""

    def __init__(self, columns: int, device: torch.device) -> None: ...

    @classmethod
    def of(cls, gram: Tensor) -> Self:
        """Forget it."""
        return cls(len(gram), gram.device)

    def add(self, inputs: Tensor) -> None:
        """Forget the inputs."""

    def finish(self, reduce: Reduce = no_reduce) -> None:
        """Do nothing."""

    def is_finite(self) -> bool:
        """Hold always: there is nothing that could be otherwise."""
        return True


class ColumnNorms(Statistic):
    """Sum of squares of each input feature: the diagonal of X^T X."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sum = CompensatedSum.zeros(columns, device=device)

    @classmethod
    def of(cls, gram: Tensor) -> Self:
        """Take the diagonal."""
        norms = cls(len(gram), gram.device)
        norms._sum.high.copy_(gram.diagonal())
        return norms

    @property
    def squares(self) -> Tensor:
        """The sums, [columns], float32."""
        return self._sum.total()

    def add(self, inputs: Tensor) -> None:
        """Add the squares of [tokens, columns]."""
        self._sum.add(inputs.square().sum(dim=0))

    def finish(self, reduce: Reduce = no_reduce) -> None:
        """Take in the squares of other processes."""
        self._sum.high.copy_(self._sum.total(reduce))
        self._sum.low.zero_()

    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        return bool(self._sum.high.isfinite().all())


class GramMatrix(Statistic):
    """X^T X of all inputs X [tokens, columns], in float32.

    It is symmetric, so only the upper triangle is computed, tile by tile: 5/8 of the
    operations of the full product. What float32 rounds off of a tile lies in the lower
    triangle until the sum is finished. Costs columns^2 floats, and for tiles of the
    diagonal, which have no place there, up to columns * min(columns / 4, 512) more.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        size = max(-(-columns // _TILES), _LEAST_TILE)
        size = min(size, MAX_TILE, max(columns, 1))
        self._matrix = torch.zeros(columns, columns, device=device)
        self._starts = range(0, columns, size)
        self._low = torch.zeros(columns, size, device=device)
        self._is_own = True

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

    @classmethod
    def of(cls, gram: Tensor) -> Self:
        """Take it as it is; `matrix` gives it back."""
        statistic = cls(0, gram.device)
        statistic._matrix = gram
        statistic._is_own = False
        return statistic

    def _tiles(self) -> Iterator[tuple[slice, slice, CompensatedSum]]:
        """Yield rows and columns of the upper triangle, and their sums."""
        size = self._starts.step
        slices = [slice(start, start + size) for start in self._starts]
        for index, rows in enumerate(slices):
            square = self._matrix[rows, rows]
            yield rows, rows, CompensatedSum(square, self._low[rows, : len(square)])
            for columns in slices[index + 1 :]:
                lower = self._matrix[columns, rows]
                yield (
                    rows,
                    columns,
                    CompensatedSum(self._matrix[rows, columns], lower.T),
                )

    def add(self, inputs: Tensor) -> None:
        """Add X^T X of X = `inputs`, [tokens, columns]."""
        assert self._starts or not inputs.shape[1], "the sums are finished"
        for rows, columns, tile in self._tiles():
            tile.add(inputs[:, rows].T @ inputs[:, columns])

    def finish(self, reduce: Reduce = no_reduce) -> None:
        """Fill in the lower triangle."""
        for rows, columns, tile in self._tiles():
            total = tile.total(reduce)
            if rows == columns:
                total = total.triu() + total.triu(1).T
            self._matrix[rows, columns] = total
            self._matrix[columns, rows] = total.T
        self._starts = range(0)
        self._low = torch.empty(0)

    def is_finite(self) -> bool:
        """Whether the diagonal is finite, and with it (Cauchy-Schwarz) all entries."""
        return bool(self._matrix.diagonal().isfinite().all())

    def matrix(self) -> Tensor:
        """Return the full symmetric matrix, [columns, columns]: not to be written to.

        The sums are finished, if they were not.
        """
        self.finish()
        return self._matrix

    def release(self) -> Tensor:
        """Return the full matrix, to be written to; a copy where it is shared.

        Nothing is left here afterwards.
        """
        matrix, self._matrix = self.matrix(), torch.empty(0)
        return matrix if self._is_own else matrix.clone()


class CrossGram:
    """W (X_dense - X)^T X of a group's matrices W: what new inputs X make them lose.

    The sum is kept without W where that is less work: where the group has more rows
    than half its columns. Costs min(rows, columns) * columns floats, twice until the
    sum is finished.
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
        """Begin with no inputs.

        Args:
            weights: The matrices, dense, [rows, columns] each; not to be written to.
        """
        self._weights = weights
        rows, columns = sum(map(len, weights)), weights[0].shape[1]
        height = self._height(rows, columns)
        self._joined = torch.cat(list(weights)) if height < columns else None
        self._sum = CompensatedSum.zeros(height, columns, device=weights[0].device)
        self._is_finished = False

    def _strips(self) -> Iterator[tuple[slice, CompensatedSum]]:
        """Yield some rows and their sums."""
        for start in range(0, len(self._sum.high), MAX_TILE):
            rows = slice(start, start + MAX_TILE)
            yield rows, CompensatedSum(self._sum.high[rows], self._sum.low[rows])

    def add(self, inputs: Tensor, dense: Tensor) -> None:
        """Take in one batch of X and X_dense, each [tokens, columns]."""
        change = dense - inputs
        own = change.T if self._joined is None else linear(self._joined, change)
        for rows, strip in self._strips():
            strip.add(own[rows] @ inputs)

    def finish(self, reduce: Reduce = no_reduce) -> None:
        """Complete the sum, as a statistic does."""
        if self._is_finished:
            return
        for _, strip in self._strips():
            strip.high.copy_(strip.total(reduce))
        self._sum = CompensatedSum(self._sum.high, torch.empty(0))
        self._is_finished = True

    def pulled(self, index: int) -> Tensor:
        """Return W (X_dense - X)^T X of one of the matrices, [rows, columns].

        The sum is finished, if it was not.
        """
        self.finish()
        weight, total = self._weights[index], self._sum.high
        if self._joined is None:
            return linear(weight, total.T)
        first = sum(map(len, self._weights[:index]))
        return total[first : first + len(weight)]
