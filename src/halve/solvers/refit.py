"""Refit: the best values for the weights that a mask keeps, by conjugate gradients.

For a mask M the layer problem min ||X (W - Z)^T||^2 over Z = Z * M falls apart into one
linear system a row, over that row's kept columns. All rows are solved at once by
conjugate gradients whose residuals are masked, preconditioned by the diagonal; ten
steps come within a few per cent of the exact solution (Meng et al., "ALPS" (2024),
section 3.3).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from halve.calibration_stats import GramMatrix
from halve.numerics.matmul import linear
from halve.patterns import Pattern
from halve.solvers.hessian import damped, relative_error
from halve.solvers.interface import Outcome, Solution, Solver, SolverCost, as_float32

STEPS = 10


def refit(
    hessian: Tensor, weight: Tensor, solution: Tensor, steps: int = STEPS
) -> Tensor:
    """Return the kept weights of a solution, tuned to the dense matrix's outputs.

    Args:
        hessian: X^T X with damping, [columns, columns].
        weight: W, the dense matrix, [rows, columns].
        solution: Z, [rows, columns]; where it is zero it stays zero.
        steps: Of conjugate gradients.

    Returns:
        [rows, columns]; its error on this Hessian is at most that of the solution.

    Cost:
        One product of the matrix with the Hessian a step.
    """
    found = solution.clone(memory_format=torch.contiguous_format)
    kept = found != 0
    scale = 1 / hessian.diagonal()
    residual = linear(weight - found, hessian).mul_(kept)
    preconditioned = residual * scale
    direction = preconditioned.clone()
    power = _dot(residual, preconditioned)
    for _ in range(steps):
        image = linear(direction, hessian)
        curvature = _dot(direction, image)
        length = torch.where(curvature > 0, power / curvature, 0)
        found.addcmul_(direction, length)
        residual.addcmul_(image.mul_(kept), length, value=-1)
        torch.mul(residual, scale, out=preconditioned)
        new_power = _dot(residual, preconditioned)
        ratio = torch.where(power > 0, new_power / power, 0)
        direction.mul_(ratio).add_(preconditioned)
        power = new_power
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row, [rows, 1]."""
    return (a * b).sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Prepared:
    """What the matrices of a group share.

    Attributes:
        gram: X^T X, [columns, columns], undamped.
        hessian: The same, damped.
        own: The state of the solver whose masks are refitted.
    """

    gram: Tensor
    hessian: Tensor
    own: Any


@dataclass(frozen=True)
class Refitted(Solver[GramMatrix, Prepared]):
    """Another solver's masks with refitted values.

    Attributes:
        solver: Chooses the masks.
        damping: Share of the mean diagonal of H that is added to its diagonal.
    """

    statistic: ClassVar = GramMatrix
    solver: Solver
    damping: float = 0.01

    def prepare(self, statistic: GramMatrix) -> Prepared:
        """Let the solver prepare with as much of the Gram matrix as it wants."""
        gram = statistic.matrix()
        hessian = damped(gram, gram.diagonal() == 0, self.damping)
        own = self.solver.prepare(self.solver.statistic.of(gram))
        return Prepared(gram, hessian, own)

    def solve(self, state: Prepared, weight: Tensor, pattern: Pattern) -> Solution:
        """Prune [rows, columns], refit, and keep whichever has the lower error."""
        weight = as_float32(weight)
        first = self.solver.solve(state.own, weight, pattern)
        tuned = refit(state.hessian, weight, first.weight)
        errors = [
            relative_error(state.gram, weight, found) for found in (first.weight, tuned)
        ]
        damping = first.outcome.damping or self.damping
        best = tuned if errors[1] < errors[0] else first.weight
        return Solution(best, Outcome(min(errors), damping))

    def work(self, rows: int, columns: int) -> SolverCost:
        """A Hessian; the vectors of conjugate gradients, or what the solver takes."""
        own = self.solver.work(rows, columns)
        return SolverCost(
            state=columns**2 + own.state,
            peak=max(own.peak, 8 * rows * columns),
            once=own.once,
            each=own.each + 2 * (STEPS + 4) * rows * columns**2,
        )
