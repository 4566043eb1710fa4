"""Rounding: the weights that a mask keeps become values of an integer grid.

Three ways, each of which loses less than the one before. To the nearest level. By the
sweep of GPTQ (Frantar et al., 2022) with the mask held, in which the columns to the
right make up for what a column loses. And by coordinate descent from there: each weight
in turn goes to the level that is best while all others stay.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from halve.grids import Grid, Levels, fit_levels
from halve.patterns import Pattern
from halve.products import linear
from halve.solvers.hessian import damped, relative_error
from halve.solvers.interface import Outcome, Solution, Solver, Work, widened
from halve.solvers.magnitude import Magnitude
from halve.solvers.sparsegpt import SparseGPT
from halve.solvers.sweep import carry, held, sweep, turned
from halve.statistics import Gram, Nothing

# Columns between two products with the whole of H or U.
_BLOCK = 128
SWEEPS = 4


def round_held(
    weight: Tensor, pruned: Tensor, factor: Tensor, levels: Levels
) -> Tensor:
    """Return weights rounded column by column, those to the right making up for it.

    Args:
        weight: What is rounded, [rows, columns].
        pruned: [rows, columns], True where the result is zero.
        factor: U, [columns, columns], upper triangular with U^T U = H^-1.
        levels: What the rest is rounded to.

    Cost:
        rows * columns^2 operations.
    """
    remaining = turned(weight)
    sweep(remaining, factor, held(pruned.T, _BLOCK, levels))
    return remaining.T


def polish(
    hessian: Tensor,
    weight: Tensor,
    rounded: Tensor,
    pruned: Tensor,
    levels: Levels,
    sweeps: int = SWEEPS,
) -> Tensor:
    """Return a rounded matrix whose weights have moved to better levels, one by one.

    While the others stay, the error of weight j is least at z_j + ((W - Z) H)_j / H_jj,
    and grows alike on both sides; so the nearest level is the best one, and no move
    raises the error. A kept weight may leave the level 0, and come to it.

    Args:
        hessian: X^T X with damping, [columns, columns].
        weight: W, the dense matrix, [rows, columns].
        rounded: Z, [rows, columns], on the grid.
        pruned: [rows, columns], True where Z is zero and stays so.
        levels: Of Z.
        sweeps: Over the columns; it ends before that where no weight moves.

    Returns:
        [rows, columns]; its error on this Hessian is at most that of Z.

    Cost:
        2 rows * columns^2 operations, and as many again a sweep.
    """
    found = turned(rounded)
    residual = linear(hessian, weight - rounded)  # [columns, rows]
    moving = _Moving(found, hessian, pruned.T.contiguous(), levels)
    for _ in range(sweeps):
        if not moving.sweep(residual):
            break
    return found.T


@dataclass(frozen=True)
class _Moving:
    """What a coordinate descent works on.

    Attributes:
        found: Z, [columns, rows]; changed in place.
        hessian: H, [columns, columns].
        pruned: [columns, rows], True where Z stays zero.
        levels: Of Z.
    """

    found: Tensor
    hessian: Tensor
    pruned: Tensor
    levels: Levels

    def sweep(self, residual: Tensor) -> bool:
        """Visit each column once and return whether any weight moved.

        Args:
            residual: ((W - Z) H)^T, [columns, rows]; kept up to date.
        """
        moved = False
        for start in range(0, len(residual), _BLOCK):
            stop = min(start + _BLOCK, len(residual))
            moves = self._block(residual[start:stop].clone(), start, stop)
            residual -= linear(self.hessian[:, start:stop], moves.T)
            moved = moved or bool(moves.any())
        return moved

    def _block(self, residual: Tensor, start: int, stop: int) -> Tensor:
        """Move the weights of a block and return by how much, [size, rows]."""
        own = self.hessian[start:stop, start:stop]
        diagonal = own.diagonal()

        def settle(j: int, move: Tensor) -> None:
            column = self.found[start + j]
            best = torch.add(column, residual[j] / diagonal[j])
            best = self.levels.round_column(best, start + j)
            best.masked_fill_(self.pruned[start + j], 0)
            torch.sub(best, column, out=move)
            column.copy_(best)

        return carry(residual, own, settle)


@dataclass(frozen=True)
class Prepared:
    """What the matrices of a group share.

    Attributes:
        gram: X^T X, [columns, columns], undamped.
        hessian: The same, damped.
        factor: U, [columns, columns], upper triangular with U^T U = H^-1.
        damping: The share of the mean diagonal that was added.
        own: The state of the solver whose solutions are rounded.
    """

    gram: Tensor
    hessian: Tensor
    factor: Tensor
    damping: float
    own: Any


@dataclass(frozen=True)
class Rounded(Solver[Gram, Prepared]):
    """Another solver's solutions, rounded with compensation.

    Its values, and not the dense ones, are what the sweep starts from: where they are
    the best that the mask allows, an error from there is all that rounding adds.

    Attributes:
        solver: Chooses masks and values; the sparsity may be 0. Where it rounds as
            well, its levels are kept to.
        grid: What kept weights are rounded to; levels are fitted to the solver's
            values.
        damping: Share of the mean diagonal of H that is added to its diagonal. Raised
            as SparseGPT does.
        sweeps: Of coordinate descent over the columns at most; 0 for none.
    """

    statistic: ClassVar = Gram
    solver: Solver
    grid: Grid
    damping: float = 0.01
    sweeps: int = SWEEPS

    def prepare(self, statistic: Gram) -> Prepared:
        """Factorise the inverse Hessian, and let the solver prepare.

        Raises:
            NumericalError: Not positive definite with any damping up to 1.
        """
        gram = statistic.matrix()
        factored = SparseGPT(self.damping).prepare(Gram.of(gram))
        hessian = damped(gram, factored.dead, factored.damping)
        own = factored
        if not self._solver_factorises_alike():
            own = self.solver.prepare(self.solver.statistic.of(gram))
        return Prepared(gram, hessian, factored.factor, factored.damping, own)

    def _solver_factorises_alike(self) -> bool:
        return (
            isinstance(self.solver, SparseGPT) and self.solver.damping == self.damping
        )

    def solve(self, state: Prepared, weight: Tensor, pattern: Pattern) -> Solution:
        """Prune [rows, columns], round, polish, and keep what has the lower error."""
        weight = widened(weight)
        first = self.solver.solve(state.own, weight, pattern)
        values, levels = first.weight, first.levels
        if levels is None:
            levels = fit_levels(self.grid, values, state.gram.diagonal())
        pruned = values == 0
        swept = round_held(values, pruned, state.factor, levels)
        polished = polish(state.hessian, weight, swept, pruned, levels, self.sweeps)
        errors = [relative_error(state.gram, weight, z) for z in (swept, polished)]
        best = polished if errors[1] < errors[0] else swept
        return Solution(best, Outcome(min(errors), state.damping), levels)

    def work(self, rows: int, columns: int) -> Work:
        """A Hessian and a factor; levels and some copies, or what the solver takes."""
        own = self.solver.work(rows, columns)
        factor = SparseGPT().work(rows, columns)
        return Work(
            state=2 * columns**2 + own.state,
            peak=max(own.peak, 10 * rows * columns),
            once=factor.once + own.once,
            each=own.each + factor.each + 2 * (self.sweeps + 3) * rows * columns**2,
        )


@dataclass(frozen=True)
class Nearest(Solver[Nothing, None]):
    """Magnitude pruning, and the nearest level for what is left.

    With a sparsity of 0 this is plain rounding. The baseline; needs no calibration.

    Attributes:
        grid: What kept weights are rounded to.
    """

    statistic: ClassVar = Nothing
    grid: Grid

    def prepare(self, statistic: Nothing) -> None:
        """Prepare nothing."""

    def solve(self, state: None, weight: Tensor, pattern: Pattern) -> Solution:
        """Zero the smallest weights, [rows, columns], and round the others."""
        kept = Magnitude().solve(None, weight, pattern).weight
        levels = fit_levels(self.grid, kept)
        return Solution(levels.round(kept), Outcome(), levels)

    def work(self, rows: int, columns: int) -> Work:
        """What magnitude takes, and levels."""
        return Work(0, 8 * rows * columns)
