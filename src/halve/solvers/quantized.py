"""Quantization: the weights that a mask keeps are rounded to an integer grid.

Three ways, each with a lower error than the one before. Round to nearest. The sweep of
GPTQ (Frantar et al., 2022) with a fixed mask, in which the columns to the right
compensate for the rounding error of a column. And coordinate descent from there: each
weight in turn takes the grid value that is best while all others stay.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halve._compat.triton import has_triton
from halve.grids import QuantParams, QuantScheme, fit_quant_params
from halve.numerics.matmul import linear
from halve.patterns import Pattern
from halve.solvers.hessian import Hessian, Needs, relative_error
from halve.solvers.interface import Outcome, Solution, Solver, SolverCost, as_float32
from halve.solvers.magnitude import Magnitude
from halve.solvers.sweep import carry, fixed_mask, sweep, transposed_copy

# Columns between two products with the whole of H or U.
_BLOCK = 128
SWEEPS = 4


def round_with_mask(
    weight: Tensor, pruned: Tensor, factor: Tensor, quant_params: QuantParams
) -> Tensor:
    """Return weights rounded column by column, the later ones compensating.

    Args:
        weight: [rows, columns], what is rounded.
        pruned: [rows, columns], True where the result is zero.
        factor: U, [columns, columns], upper triangular with U^T U = H^-1.
        quant_params: The grid of the kept weights.

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
    """Return a quantized matrix whose weights have moved to better grid values.

    While the others stay, the error is a parabola in weight j with its minimum at
    z_j + ((W - Z) H)_j / H_jj. It is symmetric about that, so the nearest grid value is
    the best one, and no move raises the error. A kept weight may leave the value 0, and
    come to it.

    Args:
        hessian: H = X^T X with damping, [columns, columns].
        weight: W, the dense matrix, [rows, columns].
        rounded: Z, [rows, columns], on the grid.
        pruned: [rows, columns], True where Z is zero and stays so.
        quant_params: The grid of Z.
        sweeps: Over the columns; it stops before that where no weight moves.

    Returns:
        [rows, columns]; its error on this Hessian is at most that of Z.

    Cost:
        2 rows * columns^2 operations, and as many again for each sweep.
    """
    moved = transposed_copy(rounded)
    residual = linear(hessian, weight - rounded)  # ((W - Z) H)^T, [columns, rows]
    descent = _Descent(moved, hessian, pruned.T.contiguous(), quant_params)
    for _ in range(sweeps):
        if not descent.sweep(residual):
            break
    return moved.T


@dataclass(frozen=True)
class _Descent:
    """State of a coordinate descent.

    Attributes:
        solution: Z^T, [columns, rows]; changed in place.
        hessian: H, [columns, columns].
        pruned: [columns, rows], True where Z stays zero.
        quant_params: The grid of Z.
    """

    solution: Tensor
    hessian: Tensor
    pruned: Tensor
    quant_params: QuantParams

    def sweep(self, residual: Tensor) -> bool:
        """Visit each column once and return whether any weight moved.

        Args:
            residual: ((W - Z) H)^T, [columns, rows]; updated in place.
        """
        any_moved = False
        for start in range(0, len(residual), _BLOCK):
            stop = min(start + _BLOCK, len(residual))
            moves = self._block(residual[start:stop].clone(), start, stop)
            # Z has changed by the moves: bring the residual of all columns up to date.
            _subtract_product(residual, self.hessian[:, start:stop], moves)
            any_moved = any_moved or bool(moves.any())
        return any_moved

    def _block(self, residual: Tensor, start: int, stop: int) -> Tensor:
        """Move the weights of a block; return by how much, [size, rows]."""
        block = self.hessian[start:stop, start:stop]
        if (moves := self._block_by_kernel(residual, block, start)) is not None:
            return moves
        diagonal = block.diagonal()

        def fix(j: int, move: Tensor) -> None:
            column = self.solution[start + j]
            best = torch.add(column, residual[j] / diagonal[j])
            best = self.quant_params.fake_quantize_column(best, start + j)
            best.masked_fill_(self.pruned[start + j], 0)
            torch.sub(best, column, out=move)
            column.copy_(best)

        return carry(residual, block, fix)

    def _block_by_kernel(
        self, residual: Tensor, block: Tensor, start: int
    ) -> Tensor | None:
        """Do what `_block` does in one kernel; None where there is none for it."""
        if not has_triton(residual.device):
            return None
        from halve.solvers.sweep_kernel import BlockKernel  # noqa: PLC0415  (triton)

        size, params = len(residual), self.quant_params
        kernel = BlockKernel(size, None, params.grid, descends=True)
        if not kernel.runs_on(residual.device):
            return None
        part = slice(start, start + size)
        solution, pruned = self.solution[part], self.pruned[part]
        return kernel.fix(residual, solution, block, pruned, params, start)


def _subtract_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Subtract the product of two matrices from a third, in place."""
    if total.device.type == "cpu":
        total -= linear(left, right.T)  # oneDNN's product is worth one more matrix
    else:
        total.addmm_(left, right, alpha=-1)


@dataclass(frozen=True)
class Quantized(Solver):
    """Another solver's solutions, quantized with compensation.

    The sweep starts from the solver's values, and not from the dense ones: where they
    are the best that the mask allows, all that quantization adds is the error from
    there.

    Attributes:
        solver: Chooses masks and values; the sparsity may be 0. Where it quantizes as
            well, its scales are kept.
        grid: Quantization scheme of the kept weights; scales are fitted to the solver's
            values.
        sweeps: Of coordinate descent over the columns at most; 0 for none.
    """

    solver: Solver
    grid: QuantScheme
    sweeps: int = SWEEPS

    @property
    def needs(self) -> Needs:
        """X^T X to measure errors, both forms of H, and what the solver reads."""
        return Needs.GRAM | Needs.DAMPED | Needs.FACTOR | self.solver.needs

    def solve(
        self,
        hessian: Hessian,
        weight: Tensor,
        pattern: Pattern,
        zeros: Tensor | None = None,
    ) -> Solution:
        """Prune [rows, columns], quantize, descend; keep what has the lower error."""
        weight = as_float32(weight)
        first = self.solver.solve(hessian, weight, pattern, zeros)
        values, params = first.weight, first.quant_params
        if params is None:
            params = fit_quant_params(self.grid, values, hessian.diagonal)
        pruned = _pruned(values, params, pattern, zeros)
        swept = round_with_mask(values, pruned, hessian.factor, params)
        moved = coordinate_descent(
            hessian.damped, weight, swept, pruned, params, self.sweeps
        )
        errors = [relative_error(hessian.gram, weight, z) for z in (swept, moved)]
        best = moved if errors[1] < errors[0] else swept
        return Solution(best, Outcome(min(errors), hessian.factor_damping), params)

    def weighing(self, importance: Tensor) -> "Quantized":
        """Let the solver choose masks by importance; rounding treats rows alone."""
        return replace(self, solver=self.solver.weighing(importance))

    def cost(self, rows: int, columns: int) -> SolverCost:
        """Scales and some copies, or what the solver takes."""
        inner = self.solver.cost(rows, columns)
        # The sweep, the residual and the errors; and each sweep of the descent.
        products = 2 * (self.sweeps + 4) * rows * columns**2
        return SolverCost(
            max(inner.peak, 10 * rows * columns), inner.operations + products
        )


@dataclass(frozen=True)
class RoundToNearest(Solver):
    """Magnitude pruning, and the nearest grid value for what is left.

    With a sparsity of 0 this is plain round-to-nearest (RTN). The baseline; needs no
    calibration.

    Attributes:
        grid: Quantization scheme of the kept weights.
    """

    grid: QuantScheme

    @property
    def needs(self) -> Needs:
        """Nothing: it looks at weights alone."""
        return Needs.NOTHING

    def solve(
        self,
        hessian: Hessian,
        weight: Tensor,
        pattern: Pattern,
        zeros: Tensor | None = None,
    ) -> Solution:
        """Zero the smallest weights, [rows, columns], and round the others."""
        kept = Magnitude().solve(hessian, weight, pattern, zeros).weight
        params = fit_quant_params(self.grid, kept)
        rounded = params.fake_quantize(kept)
        rounded.masked_fill_(_pruned(kept, params, pattern, zeros), 0)
        return Solution(rounded, Outcome(), params)

    def cost(self, rows: int, columns: int) -> SolverCost:
        """What magnitude takes, and scales."""
        return SolverCost(8 * rows * columns)


def _pruned(
    values: Tensor, quant_params: QuantParams, pattern: Pattern, zeros: Tensor | None
) -> Tensor:
    """Return which weights stay zero, [rows, columns].

    All zeros do, except where nothing is to be pruned and the grid is midrise: the few
    zeros that any matrix has by chance would then force a mask on it, which takes a bit
    for each weight.
    """
    found = values == 0
    is_dense = pattern.sparsity == 0 and zeros is None
    by_chance = quant_params.grid.midrise and is_dense
    return torch.zeros_like(found) if by_chance else found
