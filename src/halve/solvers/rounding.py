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

from halve.calibration_stats import GramMatrix, NoStatistics
from halve.grids import QuantParams, QuantScheme, fit_quant_params
from halve.numerics.matmul import linear
from halve.patterns import Pattern
from halve.solvers.hessian import damped, relative_error
from halve.solvers.interface import Outcome, Solution, Solver, SolverCost, as_float32
from halve.solvers.magnitude import Magnitude
from halve.solvers.sparsegpt import SparseGPT
from halve.solvers.sweep import carry, fixed_mask, sweep, transposed_copy

# Columns between two products with the whole of H or U.
_BLOCK = 128
SWEEPS = 4


def round_with_mask(
    weight: Tensor, pruned: Tensor, factor: Tensor, quant_params: QuantParams
) -> Tensor:
    """Return weights rounded column by column, those to the right making up for it.

    Args:
        weight: What is rounded, [rows, columns].
        pruned: [rows, columns], True where the result is zero.
        factor: U, [columns, columns], upper triangular with U^T U = H^-1.
        quant_params: What the rest is rounded to.

    Cost:
        rows * columns^2 operations.
    """
    remaining = transposed_copy(weight)
    sweep(remaining, factor, fixed_mask(pruned.T, _BLOCK, quant_params))
    return remaining.T


def coordinate_descent(
    hessian: Tensor,
    weight: Tensor,
    rounded: Tensor,
    pruned: Tensor,
    quant_params: QuantParams,
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
        quant_params: Of Z.
        sweeps: Over the columns; it ends before that where no weight moves.

    Returns:
        [rows, columns]; its error on this Hessian is at most that of Z.

    Cost:
        2 rows * columns^2 operations, and as many again a sweep.
    """
    found = transposed_copy(rounded)
    residual = linear(hessian, weight - rounded)  # [columns, rows]
    moving = _Moving(found, hessian, pruned.T.contiguous(), quant_params)
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
        quant_params: Of Z.
    """

    found: Tensor
    hessian: Tensor
    pruned: Tensor
    quant_params: QuantParams

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
            best = self.quant_params.fake_quantize_column(best, start + j)
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
class Quantized(Solver[GramMatrix, Prepared]):
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

    statistic: ClassVar = GramMatrix
    solver: Solver
    grid: QuantScheme
    damping: float = 0.01
    sweeps: int = SWEEPS

    def prepare(self, statistic: GramMatrix) -> Prepared:
        """Factorise the inverse Hessian, and let the solver prepare.

        Raises:
            NumericalError: Not positive definite with any damping up to 1.
        """
        gram = statistic.matrix()
        factored = SparseGPT(self.damping).prepare(GramMatrix.of(gram))
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
        weight = as_float32(weight)
        first = self.solver.solve(state.own, weight, pattern)
        values, quant_params = first.weight, first.quant_params
        if quant_params is None:
            quant_params = fit_quant_params(self.grid, values, state.gram.diagonal())
        pruned = values == 0
        swept = round_with_mask(values, pruned, state.factor, quant_params)
        polished = coordinate_descent(
            state.hessian, weight, swept, pruned, quant_params, self.sweeps
        )
        errors = [relative_error(state.gram, weight, z) for z in (swept, polished)]
        best = polished if errors[1] < errors[0] else swept
        return Solution(best, Outcome(min(errors), state.damping), quant_params)

    def work(self, rows: int, columns: int) -> SolverCost:
        """A Hessian and a factor; levels and some copies, or what the solver takes."""
        own = self.solver.work(rows, columns)
        factor = SparseGPT().work(rows, columns)
        return SolverCost(
            state=2 * columns**2 + own.state,
            peak=max(own.peak, 10 * rows * columns),
            once=factor.once + own.once,
            each=own.each + factor.each + 2 * (self.sweeps + 3) * rows * columns**2,
        )


@dataclass(frozen=True)
class RoundToNearest(Solver[NoStatistics, None]):
    """Magnitude pruning, and the nearest level for what is left.

    With a sparsity of 0 this is plain rounding. The baseline; needs no calibration.

    Attributes:
        grid: What kept weights are rounded to.
    """

    statistic: ClassVar = NoStatistics
    grid: QuantScheme

    def prepare(self, statistic: NoStatistics) -> None:
        """Prepare nothing."""

    def solve(self, state: None, weight: Tensor, pattern: Pattern) -> Solution:
        """Zero the smallest weights, [rows, columns], and round the others."""
        kept = Magnitude().solve(None, weight, pattern).weight
        quant_params = fit_quant_params(self.grid, kept)
        return Solution(quant_params.fake_quantize(kept), Outcome(), quant_params)

    def work(self, rows: int, columns: int) -> SolverCost:
        """What magnitude takes, and levels."""
        return SolverCost(0, 8 * rows * columns)
