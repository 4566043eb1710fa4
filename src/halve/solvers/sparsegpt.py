"""SparseGPT: prune column by column and let the weights to the right compensate.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot" (2023), algorithm 1. H = 2 X^T X / samples + damping is the Hessian of a
matrix's squared output error; U is the upper Cholesky factor of its inverse,
U^T U = H^-1. The sweep itself is in `sweep.py`; with a grid it quantizes in the same
pass what it does not prune (the paper, section 3.5).

Two things differ from the published code, with the same result. U comes from one
factorization and one triangular inverse (see `factors.py`) instead of two
factorizations and a full inverse: half the operations. And within a block the update is
applied in small chunks, so that most of it is a matrix product.

The threshold of the published code prunes one weight more than asked, and all that tie
with it; here the count is exact. The scales of a grid are searched, and not those of
minimum and maximum.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import solve_triangular, vector_norm

from halve.grids import QuantParams, QuantScheme, fit_quant_params
from halve.patterns import Pattern
from halve.solvers.factors import divide_by_factor
from halve.solvers.hessian import Hessian, Needs, added_damping
from halve.solvers.interface import Outcome, Solution, Solver, SolverCost, as_float32
from halve.solvers.sweep import adaptive_mask, sweep, transposed_copy

# Numbers of a matrix whose error is summed at once, and copies of them meanwhile. All
# of U is read for each strip: on a GPU, with less time for that, strips are higher.
_STRIP, _COPIES = 2**23, 4
_GPU_STRIP = 2**26


@dataclass(frozen=True)
class SparseGPT(Solver):
    """The published solver.

    Attributes:
        block_size: Columns over which one mask is chosen and updates are gathered.
            For n:m it is rounded to whole groups; the result does not depend on it.
        grid: Quantization scheme of the kept weights; scales are fitted to the dense
            weights. None to leave kept weights unquantized.
    """

    widens: ClassVar = False
    block_size: int = 128
    grid: QuantScheme | None = None

    @property
    def needs(self) -> Needs:
        """The factor of the inverse Hessian; the diagonal comes with it."""
        return Needs.FACTOR | Needs.DIAGONAL

    def solve(
        self,
        hessian: Hessian,
        weight: Tensor,
        pattern: Pattern,
        zeros: Tensor | None = None,
    ) -> Solution:
        """Prune [rows, columns] and compensate; rows * columns^2 operations."""
        factor = hessian.factor  # first: it may take memory while it is computed
        params = self._quant_params(hessian, weight, zeros)
        remaining = transposed_copy(weight)
        remaining[hessian.dead] = 0
        turned = None if zeros is None else zeros.T.contiguous()
        rule = adaptive_mask(pattern, self.block_size, params, turned)
        error = sweep(remaining, factor, rule)
        solution = remaining.T  # a row-major copy would be one more matrix in memory
        relative = _relative_error(hessian, error, weight, solution)
        return Solution(solution, Outcome(relative, hessian.factor_damping), params)

    def _quant_params(
        self, hessian: Hessian, weight: Tensor, zeros: Tensor | None
    ) -> QuantParams | None:
        if self.grid is None:
            return None
        kept = as_float32(weight)
        kept = kept if zeros is None else kept.masked_fill(zeros, 0)
        return fit_quant_params(self.grid, kept, hessian.diagonal)

    def cost(self, rows: int, columns: int) -> SolverCost:
        """Count the strips of the error: the swept copy is the solution."""
        size = rows * columns
        # Half a product while it sweeps, and as much for the error.
        return SolverCost(_COPIES * min(size, _STRIP), 2 * size * columns)


def _relative_error(
    hessian: Hessian, error: float, weight: Tensor, solution: Tensor
) -> float:
    """Return ||X (W - Z)^T||^2 / ||X W^T||^2, as `hessian.relative_error` does.

    X^T X may be overwritten by U already. With damping and ridges d, [columns],
    H = X^T X + diag(d), so that ||X M^T||^2 = trace M H M^T - ||M diag(d)^1/2||^2, and
    trace M H M^T = ||M U^-1||^2.

    Args:
        hessian: Of the inputs.
        error: trace (W - Z) H (W - Z)^T, damping included, as `sweep` returns it.
        weight: W, [rows, columns].
        solution: Z, [rows, columns].
    """
    damping = added_damping(hessian.diagonal, hessian.factor_damping)
    root = (hessian.ridges + damping).sqrt_()
    on_cpu = weight.device.type == "cpu"
    size = _STRIP if on_cpu else _GPU_STRIP
    energy, height = 0.0, max(size // weight.shape[1], 1)
    # In strips of rows, so that it takes no third matrix.
    for stored, pruned in zip(
        weight.split(height), solution.split(height), strict=True
    ):
        dense = stored.float().masked_fill(hessian.dead, 0)
        scaled = (dense - pruned).masked_fill_(hessian.dead, 0).mul_(root)
        error -= _squared_norm(scaled)
        energy -= _squared_norm(torch.mul(dense, root, out=scaled))
        if on_cpu:
            solve_triangular(hessian.factor, dense, upper=True, left=False, out=dense)
        else:
            divide_by_factor(dense, hessian.factor)
        energy += _squared_norm(dense)
    if energy <= 0:
        return 0.0 if error <= 0 else float("inf")
    return max(error, 0.0) / energy


def _squared_norm(rows: Tensor) -> float:
    return float(vector_norm(rows) ** 2)
