"""Magnitude pruning: the smallest weights of a matrix go. The baseline of the field."""

from typing import ClassVar

from torch import Tensor

from halve.patterns import NM, Pattern, lowest
from halve.solvers.interface import Outcome, Solution, Solver, Work, widened
from halve.statistics import Nothing


class Magnitude(Solver[Nothing, None]):
    """Prunes by |w| over the whole matrix. Needs no calibration, changes no weight."""

    statistic: ClassVar = Nothing

    def prepare(self, statistic: Nothing) -> None:
        """Prepare nothing."""

    def solve(self, state: None, weight: Tensor, pattern: Pattern) -> Solution:
        """Zero the smallest weights, [rows, columns]."""
        weight = widened(weight)
        scores = weight.abs()
        if isinstance(pattern, NM):
            pruned = pattern.mask(scores)
        else:
            pruned = lowest(scores, pattern.count(scores.numel()))
        return Solution(weight.masked_fill(pruned, 0), Outcome())

    def work(self, rows: int, columns: int) -> Work:
        """Scores, and a selection with its 64-bit indices."""
        return Work(0, 5 * rows * columns)
