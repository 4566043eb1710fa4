"""Magnitude pruning: the smallest weights of a matrix go. The baseline of the field."""

from torch import Tensor

from halve.patterns import NM, Pattern, lowest, pruned_first, with_zeros
from halve.solvers.hessian import Hessian, Needs
from halve.solvers.interface import (
    Outcome,
    Solution,
    Solver,
    SolverCost,
    as_float32,
)


class Magnitude(Solver):
    """Prunes by |w| over the whole matrix. Needs no calibration, changes no weight."""

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
        """Zero the smallest weights, [rows, columns]; one selection, no sort."""
        weight = as_float32(weight)
        scores = pruned_first(weight.abs(), zeros)
        if isinstance(pattern, NM):
            pruned = pattern.mask(scores)
        else:
            pruned = lowest(scores, pattern.count(scores.numel()))
        pruned = with_zeros(pruned, zeros)
        return Solution(weight.masked_fill(pruned, 0), Outcome())

    def cost(self, rows: int, columns: int) -> SolverCost:
        """Scores, and a selection with its 64-bit indices."""
        return SolverCost(5 * rows * columns)
