"""The interface of solvers: one verb, its result, and what it costs.

Matrices with the same inputs (q, k and v) share a `Hessian`, so whatever depends on the
inputs alone is computed once for all of them, and for all solvers that are tried.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from halve.grids import QuantParams
from halve.patterns import Pattern
from halve.solvers.hessian import Hessian, Needs


@dataclass(frozen=True)
class Outcome:
    """What a solver reports of its solution.

    Attributes:
        error: ||X (W - Z)^T||^2 / ||X W^T||^2 over the calibration inputs X, for dense
            weights W and the solution Z; None where the solver does not read X^T X.
        damping: Fraction of the mean diagonal that was added to the Gram matrix; None
            where none is used.
    """

    error: float | None = None
    damping: float | None = None


@dataclass(frozen=True)
class Solution:
    """A pruned matrix.

    Attributes:
        weight: [rows, columns], float32, zero where pruned; any memory layout.
        outcome: What the solver reports of it.
        quant_params: Scales and zero points of the grid on which all weights lie; None
            where they were not quantized.
    """

    weight: Tensor
    outcome: Outcome
    quant_params: QuantParams | None = None


def as_float32(weight: Tensor) -> Tensor:
    """Return a matrix in float32 and row-major; itself, where it already is."""
    return weight.float().contiguous()


@dataclass(frozen=True)
class SolverCost:
    """What a solver takes for one matrix, beside its group's `Hessian`.

    Attributes:
        peak: Numbers in memory at most while it solves, beside the `Hessian`, the dense
            matrix and one solution.
        operations: Multiplications and additions.
    """

    peak: int
    operations: int = 0


class Solver(ABC):
    """Prunes the matrices of a group that share their inputs.

    Attributes:
        widens: Whether a 16-bit matrix is copied to float32 beside itself while it is
            solved.

    Laws: the pattern holds exactly; where zeros are given, the solution is zero there
    and obeys the pattern; the same arguments give the same bits; permuting the rows of
    a matrix permutes the rows of the solution where the pattern is n:m.
    """

    widens: ClassVar[bool] = True

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What it reads of the inputs; reading anything else is a defect."""

    @abstractmethod
    def solve(
        self,
        hessian: Hessian,
        weight: Tensor,
        pattern: Pattern,
        zeros: Tensor | None = None,
    ) -> Solution:
        """Prune one matrix and leave it unchanged.

        Args:
            hessian: Of the matrix's inputs; shared, and not written to.
            weight: [rows, columns]; any memory layout and floating dtype. Computation
                is in float32.
            pattern: What the solution must obey.
            zeros: [rows, columns], True where the solution must be zero whatever the
                pattern asks for, because the model was pruned before. They count among
                what the pattern prunes. None for none.

        Raises:
            NumericalError: The Hessian is not positive definite.
        """

    def weighing(self, importance: Tensor) -> "Solver":
        """Return a solver for a matrix whose rows do not all count alike.

        Args:
            importance: What the squared error of each row counts for, [rows], float32,
                greater than 0.

        Returns:
            This solver, where rows do not compete for what is kept, or where it prunes
            as published.
        """
        del importance
        return self

    @abstractmethod
    def cost(self, rows: int, columns: int) -> SolverCost:
        """Return the memory and the operations for a matrix of one shape."""
