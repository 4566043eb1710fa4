"""SparseGPT: prune column by column and let the weights to the right make up for it.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot" (2023), algorithm 1. H = 2 X^T X / samples + damping is the Hessian of a
matrix's squared output error; U is the upper Cholesky factor of its inverse,
U^T U = H^-1. The sweep itself is in `sweep.py`; with a grid it rounds in the same pass
what it does not prune (the paper, section 3.5).

Two things are done otherwise than in the published code, with the same result. U comes
from one factorisation and one triangular inverse (see `_inverse_factor`) instead of
two factorisations and a full inverse: half the operations. And within a block the
update is carried in small chunks, so that most of it is a matrix product.

A threshold of the published code prunes one weight more than asked, and all that tie
with it; here the count is exact, so that a promise about it can be kept. Scales of a
grid are searched, and not those of minimum and maximum.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from halve.errors import NumericalError
from halve.grids import Grid, fit_levels
from halve.patterns import Pattern
from halve.solvers.hessian import damped, relative_error
from halve.solvers.interface import Outcome, Solution, Solver
from halve.solvers.sweep import adaptive, sweep
from halve.statistics import Gram

# The damping is raised tenfold until the factorisation succeeds, up to this share.
_MOST_DAMPING = 1.0


@dataclass(frozen=True)
class Prepared:
    """What the matrices of a group share.

    Attributes:
        gram: X^T X, [columns, columns], undamped.
        factor: U, [columns, columns], upper triangular with U^T U = H^-1.
        dead: [columns], True for inputs that are always zero.
        damping: The share of the mean diagonal that was added.
    """

    gram: Tensor
    factor: Tensor
    dead: Tensor
    damping: float


@dataclass(frozen=True)
class SparseGPT(Solver[Gram, Prepared]):
    """The published solver.

    Attributes:
        damping: Share of the mean diagonal of H that is added to its diagonal. Raised
            tenfold, up to 1, where the factorisation fails; the outcome says so.
        block_size: Columns over which one mask is chosen and updates are gathered.
            For n:m it is rounded to whole groups; the result does not depend on it.
        grid: What kept weights are rounded to; its levels are fitted to the dense
            weights. None where they are not rounded.
    """

    statistic: ClassVar = Gram
    damping: float = 0.01
    block_size: int = 128
    grid: Grid | None = None

    def prepare(self, statistic: Gram) -> Prepared:
        """Factorise the inverse Hessian; 2/3 columns^3 operations.

        Raises:
            NumericalError: Not positive definite with any damping up to 1.
        """
        gram = statistic.matrix()
        dead = gram.diagonal() == 0
        damping = self.damping
        while True:
            factor = _inverse_factor(damped(gram, dead, damping))
            if factor is not None:
                return Prepared(gram, factor, dead, damping)
            if damping >= _MOST_DAMPING:
                raise NumericalError(
                    "The Gram matrix is not positive definite, even with all of its "
                    "mean diagonal added.",
                    "Calibrate on other or more text.",
                )
            damping = min(max(damping * 10, 1e-4), _MOST_DAMPING)

    def solve(self, state: Prepared, weight: Tensor, pattern: Pattern) -> Solution:
        """Prune [rows, columns] and compensate; rows * columns^2 operations."""
        remaining = weight.T.contiguous()  # [columns, rows]: a column lies in one piece
        remaining[state.dead] = 0
        levels = None
        if self.grid is not None:
            levels = fit_levels(self.grid, weight, state.gram.diagonal())
        sweep(remaining, state.factor, adaptive(pattern, self.block_size, levels))
        solution = remaining.T.contiguous()
        error = relative_error(state.gram, weight, solution)
        return Solution(solution, Outcome(error, state.damping), levels)


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """Return upper triangular U with U^T U = H^-1, None where H is not positive.

    With J the reversal of rows and columns, J H J = L L^T gives H = M M^T for the
    upper triangular M = J L J, hence H^-1 = (M^-1)^T M^-1 and U = M^-1 = J L^-1 J.
    """
    reversed_ = hessian.flip(0, 1)
    if hessian.device.type == "cpu":
        inverse = _inverse_of_cholesky(reversed_)
    else:
        lower, failed = torch.linalg.cholesky_ex(reversed_)
        identity = torch.eye(len(lower), device=lower.device)
        inverse = (
            None
            if failed
            else torch.linalg.solve_triangular(lower, identity, upper=False)
        )
    if inverse is None or not inverse.diagonal().isfinite().all():
        return None
    return inverse.flip(0, 1)


def _inverse_of_cholesky(matrix: Tensor) -> Tensor | None:
    """Return L^-1 of a symmetric matrix L L^T, in its memory; None on failure."""
    columns = matrix.numpy().T  # LAPACK wants columns in one piece
    factorise, invert = get_lapack_funcs(("potrf", "trtri"), (columns,))
    lower, failed = factorise(columns, lower=1, overwrite_a=1)
    if failed:
        return None
    inverse, failed = invert(lower, lower=1, overwrite_c=1)
    return None if failed else torch.from_numpy(inverse)
