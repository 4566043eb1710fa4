"""Layer problems that the laws are tried on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halve.patterns import NM, Pattern, parse_pattern
from halve.solvers import SOLVERS, Hessian, Needs, Solution, Solver
from halve.solvers.hessian import ALL_NEEDS, all_needs


@dataclass(frozen=True)
class Problem:
    """A matrix [rows, columns] and its inputs [tokens, columns]."""

    weight: Tensor
    inputs: Tensor

    def solve(
        self,
        solver: str,
        pattern: Pattern | str,
        damping: float = 0.01,
        ridge: float = 0.0,
        **options,
    ) -> Solution:
        """Solve it with a row of the table of solvers."""
        row = SOLVERS[solver](**options)
        return self.solve_with(row, pattern, damping, ridge=ridge)

    def solve_with(
        self,
        solver: Solver,
        pattern: Pattern | str,
        damping: float = 0.01,
        zeros: Tensor | None = None,
        ridge: float = 0.0,
    ) -> Solution:
        """Solve it with a solver."""
        if isinstance(pattern, str):
            pattern = parse_pattern(pattern)
        needs = all_needs(solver.needs, corrects=False, ridge=ridge)
        hessian = self.hessian(needs, damping, ridge)
        return solver.solve(hessian, self.weight, pattern, zeros)

    def hessian(
        self, needs: Needs = ALL_NEEDS, damping: float = 0.01, ridge: float = 0.0
    ) -> Hessian:
        """Return the Hessian of its inputs, from the statistic that suffices."""
        statistic = needs.statistic(self.inputs.shape[1], torch.device("cpu"))
        statistic.add(self.inputs)
        return Hessian.of(statistic, damping, needs, ridge)

    def error(self, solution: Tensor) -> float:
        """Return the squared output error relative to the output, in float64."""
        inputs, weight = self.inputs.double(), self.weight.double()
        lost = inputs @ (weight - solution.double()).T
        return float(lost.square().sum() / (inputs @ weight.T).square().sum())


def _some_zeros(shape: torch.Size) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.6


def _grouped_zeros(shape: torch.Size) -> Tensor:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(8))
    return NM(2, 4).mask(scores)


def _blocks_of_zeros(shape: torch.Size) -> Tensor:
    """Return whole columns: dense blocks of the sweep beside empty ones."""
    return (torch.arange(shape[1]) < shape[1] // 3).expand(shape).clone()


# Masks of matrices that were pruned before.
ZEROS: dict[str, Callable[[torch.Size], Tensor]] = {
    "unstructured": _some_zeros,
    "2:4": _grouped_zeros,
    "columns": _blocks_of_zeros,
}


def correlated(rows: int = 48, columns: int = 160, seed: int = 0) -> Problem:
    """Return inputs whose features depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    scales = torch.rand(columns, generator=generator) + 0.2
    inputs = torch.randn(6 * columns, columns, generator=generator)
    inputs = (inputs + inputs @ mixing) * scales
    return Problem(torch.randn(rows, columns, generator=generator), inputs)


def few_tokens() -> Problem:
    """Return fewer tokens than columns: X^T X has rank 40 of 160."""
    problem = correlated(seed=4)
    return Problem(problem.weight, problem.inputs[:40])


def outliers() -> Problem:
    """Return inputs of which three features are a hundred times as large."""
    problem = correlated(seed=5)
    problem.inputs[:, [3, 40, 111]] *= 100
    return problem


def two_directions() -> Problem:
    """Return inputs that vary, but for a little noise, along two directions only."""
    generator = torch.Generator().manual_seed(6)
    problem = correlated(seed=6)
    directions = torch.randn(2, 160, generator=generator)
    along = torch.randn(len(problem.inputs), 2, generator=generator) @ directions
    return Problem(problem.weight, along + 0.01 * problem.inputs)
