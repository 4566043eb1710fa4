"""What a solver needs to know of a matrix's inputs, gathered batch by batch.

Three kinds, from nothing to everything: `Nothing`, `ColumnNorms`, `Gram`. Each takes
inputs [tokens, columns] in float32 and keeps no more than it must. `Drift` is what has
become of the inputs since they were a dense model's.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from halve.products import linear

# Tiles of the triangle: few enough for large products, enough to save nearly half.
_TILES = 4
# Rows of a tile at least: thinner products cost more than the triangle saves.
_LEAST_TILE = 128


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
    def sums(self) -> list[Tensor]:
        """Return what is summed, to be added to in place by that of other inputs."""

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether every input so far was finite and no sum overflowed."""


class Nothing(Statistic):
    """For solvers that look at weights alone."""

    def __init__(self, columns: int, device: torch.device) -> None: ...

    @classmethod
    def of(cls, gram: Tensor) -> Self:
        """Forget it."""
        return cls(len(gram), gram.device)

    def add(self, inputs: Tensor) -> None:
        """Forget the inputs."""

    def sums(self) -> list[Tensor]:
        """Return none."""
        return []

    def is_finite(self) -> bool:
        """Hold always: there is nothing that could be otherwise."""
        return True


class ColumnNorms(Statistic):
    """Sum of squares of each input feature.

    Attributes:
        squares: [columns], float32: the diagonal of X^T X.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.squares = torch.zeros(columns, device=device)

    @classmethod
    def of(cls, gram: Tensor) -> Self:
        """Take the diagonal."""
        norms = cls(len(gram), gram.device)
        norms.squares += gram.diagonal()
        return norms

    def add(self, inputs: Tensor) -> None:
        """Add the squares of [tokens, columns]."""
        self.squares += inputs.square().sum(dim=0)

    def sums(self) -> list[Tensor]:
        """Return the squares."""
        return [self.squares]

    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        return bool(self.squares.isfinite().all())


class Gram(Statistic):
    """X^T X of all inputs X [tokens, columns], in float32.

    It is symmetric, so only the upper triangle is computed, tile by tile: 5/8 of the
    operations of the full product. Costs columns^2 floats.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self._upper = torch.zeros(columns, columns, device=device)
        size = -(-columns // _TILES)
        self._starts: range | None = range(0, columns, max(size, _LEAST_TILE))
        self._is_own = True

    @classmethod
    def of(cls, gram: Tensor) -> Self:
        """Take it as it is; `matrix` gives it back."""
        statistic = cls(0, gram.device)
        statistic._upper = gram
        statistic._starts = None  # both triangles are there already
        statistic._is_own = False
        return statistic

    def add(self, inputs: Tensor) -> None:
        """Add X^T X of X = `inputs`, [tokens, columns]."""
        assert self._starts is not None, "the matrix was completed"
        for start in self._starts:
            stop = start + self._starts.step
            tile = self._upper[start:stop, start:]
            tile.addmm_(inputs[:, start:stop].T, inputs[:, start:])

    def sums(self) -> list[Tensor]:
        """Return the matrix, of which the lower triangle need not be filled in yet."""
        return [self._upper]

    def is_finite(self) -> bool:
        """Whether the diagonal is finite, and with it (Cauchy-Schwarz) all entries."""
        return bool(self._upper.diagonal().isfinite().all())

    def matrix(self) -> Tensor:
        """Return the full symmetric matrix, [columns, columns]: not to be written to.

        It is completed in place, so nothing can be added afterwards.
        """
        matrix = self._upper
        starts, self._starts = self._starts or range(0), None
        for start in starts:
            stop = start + starts.step
            square = matrix[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            matrix[stop:, start:stop] = matrix[start:stop, stop:].T
        return matrix

    def release(self) -> Tensor:
        """Return the full matrix, to be written to; a copy where it is shared.

        Nothing is left here afterwards.
        """
        matrix, self._upper = self.matrix(), torch.empty(0)
        return matrix if self._is_own else matrix.clone()


class Drift:
    """W (X_dense - X)^T X of a group's matrices W: what new inputs X make them lose.

    The sum is kept without W where that is less work: where the group has more rows
    than half its columns. Costs min(rows, columns) * columns floats.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """Begin with no inputs.

        Args:
            weights: The matrices, dense, [rows, columns] each; not to be written to.
        """
        self._weights = weights
        rows, columns = sum(map(len, weights)), weights[0].shape[1]
        self._joined = torch.cat(list(weights)) if 2 * rows < columns else None
        height = columns if self._joined is None else rows
        self._sum = torch.zeros(height, columns, device=weights[0].device)

    def add(self, inputs: Tensor, dense: Tensor) -> None:
        """Take in one batch of X and X_dense, each [tokens, columns]."""
        change = dense - inputs
        own = change.T if self._joined is None else linear(self._joined, change)
        self._sum.addmm_(own, inputs)

    def sums(self) -> list[Tensor]:
        """Return what is summed, to be added to in place by that of other inputs."""
        return [self._sum]

    def pulled(self, index: int) -> Tensor:
        """Return W (X_dense - X)^T X of one of the matrices, [rows, columns]."""
        weight = self._weights[index]
        if self._joined is None:
            return linear(weight, self._sum.T)
        first = sum(map(len, self._weights[:index]))
        return self._sum[first : first + len(weight)]
