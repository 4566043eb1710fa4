"""Magnitude pruning: the smallest weights of a matrix go. The baseline of the field."""

from typing import ClassVar

from torch import Tensor

from halve.calibration_stats import NoStatistics
from halve.patterns import NM, Pattern, lowest
from halve.solvers.interface import Outcome, Solution, Solver, SolverCost, as_float32


class Magnitude(Solver[NoStatistics, None]):
    """Prunes by |w| over the whole matrix. Needs no calibration, changes no weight."""

    statistic: ClassVar = NoStatistics

    def prepare(self, statistic: NoStatistics) -> None:
        """Prepare nothing."""

    def solve(self, state: None, weight: Tensor, pattern: Pattern) -> Solution:
        """Zero the smallest weights, [rows, columns]."""
        weight = as_float32(weight)
        scores = weight.abs()
        if isinstance(pattern, NM):
            pruned = pattern.mask(scores)
        else:
            pruned = lowest(scores, pattern.count(scores.numel()))
        return Solution(weight.masked_fill(pruned, 0), Outcome())

    def work(self, rows: int, columns: int) -> SolverCost:
        """Scores, and a selection with its 64-bit indices."""
        return SolverCost(0, 5 * rows * columns)
