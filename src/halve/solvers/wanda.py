"""Wanda: prune by weight times input norm, row by row, and change no weight.

Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language
Models" (2023), equation 1.
"""

import torch
from torch import Tensor

from halve.patterns import (
    NM,
    Exact,
    Pattern,
    Unstructured,
    pruned_first,
    with_zeros,
)
from halve.solvers.hessian import Hessian, Needs
from halve.solvers.interface import (
    Outcome,
    Solution,
    Solver,
    SolverCost,
    as_float32,
)


class Wanda(Solver):
    """Prunes by |w_ij| ||x_j|| among the weights of each output."""

    @property
    def needs(self) -> Needs:
        """The norm of each input feature."""
        return Needs.DIAGONAL

    def solve(
        self,
        hessian: Hessian,
        weight: Tensor,
        pattern: Pattern,
        zeros: Tensor | None = None,
    ) -> Solution:
        """Zero the lowest scores, [rows, columns]; one sort of each row."""
        weight = as_float32(weight)
        scores = pruned_first(weight.abs() * hessian.diagonal.sqrt(), zeros)
        if isinstance(pattern, NM):
            pruned = pattern.mask(scores)
        else:
            pruned = _lowest_of_each_row(scores, pattern)
        pruned = with_zeros(pruned, zeros)
        return Solution(weight.masked_fill(pruned, 0), Outcome())

    def cost(self, rows: int, columns: int) -> SolverCost:
        """Scores, and the second of two sorts with its 64-bit indices."""
        return SolverCost(8 * rows * columns)


def _lowest_of_each_row(scores: Tensor, pattern: Unstructured | Exact) -> Tensor:
    """Return a mask whose rows differ by one at most and add up to the exact count."""
    rows, columns = scores.shape
    # Weights pruned in the first `row` rows together; their differences are the rows'.
    totals = torch.tensor(
        [pattern.count(row * columns) for row in range(rows + 1)], device=scores.device
    )
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return ranks < totals.diff()[:, None]
