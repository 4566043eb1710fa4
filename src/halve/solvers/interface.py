"""What every solver is: two verbs and two results.

One Gram matrix serves several matrices (q, k and v see the same input), so the work
that depends on the inputs alone is done once, in `prepare`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from halve.calibration_stats import Statistic
from halve.grids import QuantParams
from halve.patterns import Pattern

S = TypeVar("S", bound=Statistic)
State = TypeVar("State")


@dataclass(frozen=True)
class Outcome:
    """What a solver can say of its solution.

    Attributes:
        error: ||X (W - Z)^T||^2 / ||X W^T||^2 over the calibration inputs X, for dense
            weights W and the solution Z; None where the solver does not know X^T X.
        damping: Share of the mean diagonal that was added to the Gram matrix; None
            where none is used.
    """

    error: float | None = None
    damping: float | None = None


@dataclass(frozen=True)
class Solution:
    """A pruned matrix.

    Attributes:
        weight: [rows, columns], float32, zero where pruned; in any order in memory.
        outcome: What the solver knows about it.
        quant_params: What its weights were rounded to, and all lie on; None where they were
            not rounded.
    """

    weight: Tensor
    outcome: Outcome
    quant_params: QuantParams | None = None


def as_float32(weight: Tensor) -> Tensor:
    """Return a matrix in float32, row after row; itself, where it is so."""
    return weight.float().contiguous()


@dataclass(frozen=True)
class SolverCost:
    """What a solver takes for matrices of one shape.

    Attributes:
        state: Numbers in memory, beside the statistic and the dense matrix, from
            `prepare` to the last `solve`.
        peak: Numbers on top of that and of one solution, at most, while it prepares or
            solves.
        once: Multiplications and additions of `prepare`.
        each: Those of one `solve`.
    """

    state: int
    peak: int
    once: int = 0
    each: int = 0


class Solver(ABC, Generic[S, State]):
    """Prunes the matrices of a group that share their inputs.

    Attributes:
        statistic: What it needs to know of the inputs.
        widens: Whether a matrix of 16 bits lies beside itself in float32 while it is
            solved.

    Laws: the pattern holds exactly; the same arguments give the same bits;
    permuting the rows of a matrix permutes the rows of the solution where the
    pattern is n:m.
    """

    statistic: ClassVar[type[Statistic]]
    widens: ClassVar[bool] = True

    @abstractmethod
    def prepare(self, statistic: S) -> State:
        """Do, once, what all matrices with these inputs share.

        The statistic is used up: nothing may be added to it or asked of it afterwards.
        Raises NumericalError where it cannot be computed with.
        """

    @abstractmethod
    def solve(self, state: State, weight: Tensor, pattern: Pattern) -> Solution:
        """Prune one matrix, [rows, columns], and leave it as it was.

        It may lie in memory in any order and be of fewer bits than float32, in which
        all is computed.
        """

    @abstractmethod
    def work(self, rows: int, columns: int) -> SolverCost:
        """Return the memory and the operations it takes for matrices of one shape."""
