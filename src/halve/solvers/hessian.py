"""The Hessian of a layer problem, shared by all matrices and candidates of a group.

Pruning a matrix W [rows, columns] to Z costs the squared output error

    ||X (W - Z)^T||^2 = trace (W - Z) H (W - Z)^T,    H = X^T X,

on calibration inputs X [tokens, columns]. Matrices with the same inputs (q, k, v; gate,
up) have the same H. `Hessian` holds it, and what solvers derive from it: each derived
matrix is computed once, when a solver first asks for it, and serves all of them.
"""

from collections.abc import Callable, Iterator
from enum import Flag, auto
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from halve.calibration_stats import ColumnNorms, GramMatrix, NoStatistics, Statistic
from halve.errors import NumericalError
from halve.numerics.matmul import linear
from halve.solvers.factors import inverse_factor, scratch

# The damping is raised up to this fraction of the mean diagonal.
_MAX_DAMPING = 1.0
# Rows and columns that are mirrored at once.
_TILE = 1024
# Bytes of shifted inverses that are cached for the next matrix of the group.
_MAX_CACHED_BYTES = 2**30
# Bytes of a number in float32.
_FLOAT = 4
# Values of rho that ADMM visits in a group, as a rule.
_SHIFTS = 8

Factor = TypeVar("Factor")


class Needs(Flag):
    """What a solver reads of a group's inputs.

    The union over all candidates decides which statistic is accumulated, whether the
    Gram matrix may be overwritten by its factor, and what the memory forecast counts.
    """

    NOTHING = 0
    DIAGONAL = auto()
    """||x_j||^2 of each input feature."""
    GRAM = auto()
    """X^T X itself."""
    DAMPED = auto()
    """X^T X with damping on its diagonal."""
    FACTOR = auto()
    """The upper Cholesky factor of the inverse of the damped matrix."""
    SCALED = auto()
    """The damped matrix scaled to a unit diagonal, and its shifted inverses."""

    @property
    def statistic(self) -> type[Statistic]:
        """The smallest calibration statistic that suffices."""
        if self == Needs.NOTHING:
            return NoStatistics
        return ColumnNorms if self == Needs.DIAGONAL else GramMatrix

    @property
    def overwrites_gram(self) -> bool:
        """Whether the factor may be computed in the memory of X^T X."""
        others = Needs.GRAM | Needs.DAMPED | Needs.SCALED
        return Needs.FACTOR in self and not self & others


ALL_NEEDS = ~Needs.NOTHING


def all_needs(needs: Needs, corrects: bool, ridge: float) -> Needs:
    """Return what is read of a Hessian, by solvers and by what surrounds them.

    Args:
        needs: Of the solvers.
        corrects: Whether targets are corrected, which takes the factor.
        ridge: Of the Hessian. The ridge of a column follows from a factor, and a
            factor with ridges is not computed in place of X^T X.
    """
    if corrects:
        needs |= Needs.FACTOR
    inverts = needs & (Needs.FACTOR | Needs.DAMPED | Needs.SCALED)
    return needs | Needs.FACTOR | Needs.DAMPED if ridge and inverts else needs


class Hessian:
    """H = X^T X of one group of matrices, its damped forms and factors.

    Matrices are [columns, columns] float32, must not be written to, and are cached:
    the first access to each costs its computation. Where only the factor is needed it
    is computed in place of X^T X, which cannot be read afterwards.

    Attributes:
        damping: Fraction of the mean diagonal that is added to the diagonal.
        ridge: Factor of `ridges`; 0 for none.
    """

    def __init__(
        self,
        gram: Tensor | None,
        diagonal: Tensor | None,
        damping: float,
        overwrites_gram: bool,
        ridge: float = 0.0,
    ) -> None:
        self.damping = damping
        self.ridge = ridge
        self._gram = gram
        self._diagonal = diagonal
        self._overwrites_gram = overwrites_gram
        self._inverses: dict[float, Tensor] = {}

    @classmethod
    def of(
        cls,
        statistic: Statistic,
        damping: float = 0.01,
        needs: Needs = ALL_NEEDS,
        ridge: float = 0.0,
    ) -> "Hessian":
        """Take over what a statistic has accumulated; the statistic is empty then.

        Args:
            statistic: A `GramMatrix` for everything; `ColumnNorms` for the diagonal
                alone; `NoStatistics` where nothing is read.
            damping: Fraction of the mean diagonal that is added to the diagonal.
            needs: What will be read; of `all_needs` where there is a ridge.
            ridge: Factor of `ridges`.
        """
        if isinstance(statistic, GramMatrix):
            gram = statistic.take()
            overwrites = needs.overwrites_gram
            return cls(gram, gram.diagonal().clone(), damping, overwrites, ridge)
        if isinstance(statistic, ColumnNorms):
            return cls(None, statistic.squares, damping, False)
        return cls(None, None, damping, False)

    def prepare(self, needs: Needs) -> None:
        """Compute now what will be read, before solvers allocate memory of their own.

        Raises:
            NumericalError: Not positive definite with any damping up to 1.
        """
        if Needs.FACTOR in needs:
            _ = self.factor
        if Needs.DAMPED in needs:
            _ = self.damped
        if Needs.SCALED in needs:
            _ = self.scaled

    @staticmethod
    def nbytes(columns: int, needs: Needs) -> int:
        """Return the bytes that it holds beside X^T X, once all is computed.

        Args:
            columns: Width of the inputs.
            needs: What is read of it.
        """
        square = _FLOAT * columns**2
        inverses = min(_SHIFTS * square, _MAX_CACHED_BYTES)
        return (
            square * bool(needs & (Needs.DAMPED | Needs.SCALED))
            + square * (Needs.FACTOR in needs and not needs.overwrites_gram)
            + (square + inverses) * (Needs.SCALED in needs)
        )

    @staticmethod
    def scratch_nbytes(columns: int, needs: Needs) -> int:
        """Return the bytes that are in memory for a while when it is computed."""
        # A shifted matrix, its Cholesky factor and its inverse.
        shifted = 3 * columns**2 * (Needs.SCALED in needs)
        return _FLOAT * max(shifted, scratch(columns) * (Needs.FACTOR in needs))

    @staticmethod
    def operations(columns: int, needs: Needs) -> int:
        """Return the multiplications and additions that computing it takes."""
        factor = columns**3 * 4 // 3 * (Needs.FACTOR in needs)
        return factor + 2 * _SHIFTS * columns**3 * (Needs.SCALED in needs)

    @property
    def diagonal(self) -> Tensor:
        """[columns], the diagonal of X^T X; zero for features that are always zero."""
        assert self._diagonal is not None, "no statistic of the inputs was accumulated"
        return self._diagonal

    @cached_property
    def dead(self) -> Tensor:
        """[columns], True for input features that are zero in every token."""
        return self.diagonal == 0

    @property
    def gram(self) -> Tensor:
        """X^T X, undamped."""
        assert self._gram is not None, "X^T X was overwritten, or never accumulated"
        return self._gram

    @cached_property
    def ridges(self) -> Tensor:
        """[columns], what is added to the diagonal beside damping.

        A solution makes up for a weight of feature j by weights of features that
        correlate with it, and correlations differ between texts. Of the mean square d_j
        of feature j, the others leave unexplained

            u_j = 1 / (d_j [H^-1]_jj),

        1 where it is uncorrelated and 0 where it follows from the others. What is added
        is ridge u_j^2 d_j. Where u_j is small, correlations come from the weights (a
        narrow matrix, a common component) and hold for any text, and a fixed fraction
        of d_j would do harm there (docs/log.md). A heuristic, chosen by experiment.
        """
        if not self.ridge:
            return torch.zeros_like(self.diagonal)
        factor, _ = factorize(self.gram.clone(), self.damping, inverse_factor)
        inverse_diagonal = vector_norm(factor, dim=0).square_()
        unexplained = 1 / (self.diagonal * inverse_diagonal)
        ridges = self.ridge * unexplained.square_() * self.diagonal
        return ridges.masked_fill_(self.dead, 0)

    @cached_property
    def damped(self) -> Tensor:
        """H of the published code, up to its scale, and with ridges.

        No solution depends on the scale. The diagonal of a dead feature is 1, so that
        the matrix is invertible.
        """
        damped = self.gram.clone()
        diagonal = damped.diagonal()
        diagonal[self.dead] = 1
        diagonal += added_damping(self.diagonal, self.damping) + self.ridges
        return damped

    @cached_property
    def scale(self) -> Tensor:
        """[columns], square roots of the diagonal of `damped`."""
        return self.damped.diagonal().sqrt()

    @cached_property
    def scaled(self) -> Tensor:
        """`damped`, its rows and columns scaled so that the diagonal is 1."""
        return self.damped / self.scale / self.scale[:, None]

    def shifted_inverse(self, rho: float) -> Tensor:
        """Return (scaled + rho I)^-1; columns^3 operations where it is not cached.

        Raises:
            NumericalError: The shifted matrix is not positive definite.
        """
        if rho in self._inverses:
            return self._inverses[rho]
        shifted = self.scaled.clone()
        shifted.diagonal().add_(rho)
        inverse = _inverse(shifted)
        if inverse is None:
            raise NumericalError(
                "The Gram matrix is not positive definite.",
                "Raise --damping, or calibrate on other or more text.",
            )
        if (len(self._inverses) + 1) * inverse.nbytes <= _MAX_CACHED_BYTES:
            self._inverses[rho] = inverse
        return inverse

    @property
    def factor(self) -> Tensor:
        """U, upper triangular with U^T U = H^-1 for the damped H.

        Raises:
            NumericalError: Not positive definite with any damping up to 1.
        """
        return self._factorized[0]

    @property
    def factor_damping(self) -> float:
        """The damping with which `factor` was found: raised tenfold until it was."""
        return self._factorized[1]

    @cached_property
    def _factorized(self) -> tuple[Tensor, float]:
        if not self._overwrites_gram:
            ridges = self.ridges  # first: it takes the memory of a factor for a while
            return factorize(self.gram.clone(), self.damping, inverse_factor, ridges)
        gram, self._gram = self.gram, None
        return factorize(gram, self.damping, inverse_factor)


def factorize(
    gram: Tensor,
    damping: float,
    attempt: Callable[[Tensor], Factor | None],
    ridges: Tensor | float = 0.0,
) -> tuple[Factor, float]:
    """Factorize a damped Hessian, with ten times the damping until that succeeds.

    Args:
        gram: X^T X, [columns, columns]; overwritten.
        damping: Fraction of the mean diagonal to begin with.
        attempt: Given the damped Hessian, returns a factor, which may lie in its
            memory. Or returns None where it is not positive definite, and has then
            overwritten no more than the diagonal and what is above it.
        ridges: [columns], what is added to the diagonal beside damping.

    Returns:
        The factor, and the damping with which it was found.

    Raises:
        NumericalError: Not positive definite with any damping up to 1.
    """
    diagonal = gram.diagonal().clone()
    for fraction in _dampings(damping):
        gram.diagonal().copy_(diagonal).masked_fill_(diagonal == 0, 1)
        gram.diagonal().add_(added_damping(diagonal, fraction) + ridges)
        factor = attempt(gram)
        if factor is not None:
            return factor, fraction
        _mirror(gram)  # the lower triangle is intact: restore the upper one from it
    raise NumericalError(
        "The Gram matrix is not positive definite, even with all of its mean diagonal "
        "added.",
        "Calibrate on other or more text.",
    )


def _inverse(matrix: Tensor) -> Tensor | None:
    """Return the inverse of a matrix; None where it is not positive definite.

    Args:
        matrix: [columns, columns], float32; it may be overwritten.
    """
    if matrix.device.type == "cpu":
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if failed or not lower.diagonal().isfinite().all():
            return None
        return torch.cholesky_inverse(lower)
    # cuSOLVER does not take every size; `inverse_factor` gives it squares.
    factor = inverse_factor(matrix)
    return None if factor is None else factor.T @ factor


def _dampings(first: float) -> Iterator[float]:
    """Yield the damping that was asked for, then ten times as much each, up to 1."""
    yield first
    raised = max(first * 10, 1e-4)
    while first < _MAX_DAMPING:
        first = min(raised, _MAX_DAMPING)
        yield first
        raised *= 10


def _mirror(matrix: Tensor) -> None:
    """Copy what is below the diagonal above it, in place."""
    for start in range(0, len(matrix), _TILE):
        stop = start + _TILE
        square = matrix[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).T)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T


def added_damping(diagonal: Tensor, damping: float) -> float:
    """Return what damping adds to the diagonal of X^T X.

    Args:
        diagonal: [columns], of X^T X; features that are always zero count as 1.
        damping: Fraction of the mean diagonal.
    """
    return damping * float(diagonal.masked_fill(diagonal == 0, 1).mean())


def relative_error(gram: Tensor, weight: Tensor, solution: Tensor) -> float:
    """Return ||X (W - Z)^T||^2 / ||X W^T||^2 from X^T X.

    Args:
        gram: X^T X, [columns, columns].
        weight: W, [rows, columns].
        solution: Z, [rows, columns].

    Returns:
        0 where both are zero, and infinity where only the dense output is.
    """
    error, energy = (_energy(gram, matrix) for matrix in (weight - solution, weight))
    if energy == 0:
        return 0.0 if error == 0 else float("inf")
    return max(error, 0.0) / energy


def _energy(gram: Tensor, matrix: Tensor) -> float:
    """Return trace M X^T X M^T = ||X M^T||^2."""
    return float((linear(matrix, gram) * matrix).sum())
