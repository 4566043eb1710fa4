"""SparseGPT: prune column by column and let the weights to the right make up for it.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot" (2023), algorithm 1. H = 2 X^T X / samples + damping is the Hessian of a
matrix's squared output error; U is the upper Cholesky factor of its inverse,
U^T U = H^-1. The sweep itself is in `sweep.py`; with a grid it rounds in the same pass
what it does not prune (the paper, section 3.5).

Two things are done otherwise than in the published code, with the same result. U comes
from one factorisation and one triangular inverse (see `factors.py`) instead of
two factorisations and a full inverse: half the operations. And within a block the
update is carried in small chunks, so that most of it is a matrix product.

A threshold of the published code prunes one weight more than asked, and all that tie
with it; here the count is exact, so that a promise about it can be kept. Scales of a
grid are searched, and not those of minimum and maximum.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.linalg import solve_triangular, vector_norm

from halve.calibration_stats import GramMatrix
from halve.grids import QuantScheme, fit_quant_params
from halve.patterns import Pattern
from halve.solvers.factors import inverse_factor, scratch
from halve.solvers.hessian import damping_of, factorise
from halve.solvers.interface import Outcome, Solution, Solver, SolverCost, as_float32
from halve.solvers.sweep import adaptive_mask, sweep, transposed_copy

# Numbers of a matrix whose error is summed at once, and copies of them meanwhile.
_STRIP, _COPIES = 2**23, 4


@dataclass(frozen=True)
class Prepared:
    """What the matrices of a group share.

    Attributes:
        factor: U, [columns, columns], upper triangular with U^T U = H^-1.
        diagonal: [columns], of X^T X; zero for inputs that are always zero.
        damping: The share of its mean that was added to it.
    """

    factor: Tensor
    diagonal: Tensor
    damping: float

    @property
    def dead(self) -> Tensor:
        """[columns], True for inputs that are always zero."""
        return self.diagonal == 0

    def relative(self, lost: float, weight: Tensor, solution: Tensor) -> float:
        """Return ||X (W - Z)^T||^2 / ||X W^T||^2, as `hessian.relative_error` does.

        Args:
            lost: trace (W - Z) H (W - Z)^T: the error with what damping adds to it.
            weight: W, [rows, columns].
            solution: Z, [rows, columns].
        """
        added = damping_of(self.diagonal, self.damping)
        kept, rows = 0.0, max(_STRIP // weight.shape[1], 1)
        # Some rows at a time, so that it takes no third matrix.
        for stored, own in zip(weight.split(rows), solution.split(rows), strict=True):
            dense = stored.float().masked_fill(self.dead, 0)
            lost -= added * _square((dense - own).masked_fill_(self.dead, 0))
            kept -= added * _square(dense)
            # X^T X is no more: U is in its place.
            solve_triangular(self.factor, dense, upper=True, left=False, out=dense)
            kept += _square(dense)
        if kept <= 0:
            return 0.0 if lost <= 0 else float("inf")
        return max(lost, 0.0) / kept


def _square(rows: Tensor) -> float:
    return float(vector_norm(rows) ** 2)


@dataclass(frozen=True)
class SparseGPT(Solver[GramMatrix, Prepared]):
    """The published solver.

    Attributes:
        damping: Share of the mean diagonal of H that is added to its diagonal. Raised
            tenfold, up to 1, where the factorisation fails; the outcome says so.
        block_size: Columns over which one mask is chosen and updates are gathered.
            For n:m it is rounded to whole groups; the result does not depend on it.
        grid: What kept weights are rounded to; its levels are fitted to the dense
            weights. None where they are not rounded.
    """

    statistic: ClassVar = GramMatrix
    widens: ClassVar = False
    damping: float = 0.01
    block_size: int = 128
    grid: QuantScheme | None = None

    def prepare(self, statistic: GramMatrix) -> Prepared:
        """Factorise the inverse Hessian.

        Costs 2/3 columns^3 operations; on the CPU in the memory of the Gram matrix.

        Raises:
            NumericalError: Not positive definite with any damping up to 1.
        """
        gram = statistic.release()
        diagonal = gram.diagonal().clone()
        factor, damping = factorise(gram, self.damping, inverse_factor)
        return Prepared(factor, diagonal, damping)

    def solve(self, state: Prepared, weight: Tensor, pattern: Pattern) -> Solution:
        """Prune [rows, columns] and compensate; rows * columns^2 operations."""
        quant_params = None
        if self.grid is not None:
            quant_params = fit_quant_params(
                self.grid, as_float32(weight), state.diagonal
            )
        remaining = transposed_copy(weight)
        remaining[state.dead] = 0
        rule = adaptive_mask(pattern, self.block_size, quant_params)
        lost = sweep(remaining, state.factor, rule)
        solution = remaining.T  # a copy in the usual order would be one matrix more
        error = state.relative(lost, weight, solution)
        return Solution(solution, Outcome(error, state.damping), quant_params)

    def work(self, rows: int, columns: int) -> SolverCost:
        """A copy is swept and is the solution; the factor takes H's own place."""
        size = rows * columns
        # There is no solution yet while it factorises.
        peak = max(_COPIES * min(size, _STRIP), scratch(columns) - size)
        # Half a product while it sweeps, and as much for the error.
        return SolverCost(0, peak, columns**3 * 4 // 3, 2 * size * columns)
