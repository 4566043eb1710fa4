"""Refit: the best values for the weights that a mask keeps, by conjugate gradients.

For a mask M the layer problem min ||X (W - Z)^T||^2 over Z = Z * M separates into one
linear system for each row, over that row's kept columns. All rows are solved at once by
conjugate gradients whose residuals are masked, with the diagonal as preconditioner; ten
steps come within a few per cent of the exact solution (Meng et al., "ALPS" (2024),
section 3.3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halve.numerics.matmul import linear
from halve.patterns import Pattern
from halve.solvers.hessian import Hessian, Needs, relative_error
from halve.solvers.interface import Outcome, Solution, Solver, SolverCost, as_float32

STEPS = 10


def refit(
    hessian: Tensor, weight: Tensor, solution: Tensor, steps: int = STEPS
) -> Tensor:
    """Return a solution whose kept weights are tuned to the dense matrix's outputs.

    Args:
        hessian: H = X^T X with damping, [columns, columns].
        weight: W, the dense matrix, [rows, columns].
        solution: Z, [rows, columns]; where it is zero it stays zero.
        steps: Of conjugate gradients.

    Returns:
        [rows, columns]; its error on this Hessian is at most that of the solution.

    Cost:
        One product of the matrix with the Hessian for each step.
    """
    refitted = solution.clone(memory_format=torch.contiguous_format)
    kept = refitted != 0
    scale = 1 / hessian.diagonal()  # the preconditioner
    # r = (W - Z) H on the kept columns: minus half the gradient of the error.
    residual = linear(weight - refitted, hessian).mul_(kept)
    preconditioned = residual * scale
    direction = preconditioned.clone()
    power = _dot(residual, preconditioned)
    for _ in range(steps):
        image = linear(direction, hessian)
        # alpha = r.z / p.Hp, row by row; 0 where a row has converged (0 / 0).
        curvature = _dot(direction, image)
        length = torch.where(curvature > 0, power / curvature, 0)
        refitted.addcmul_(direction, length)
        residual.addcmul_(image.mul_(kept), length, value=-1)
        torch.mul(residual, scale, out=preconditioned)
        # beta = r'.z' / r.z; the next direction is conjugate to those before.
        new_power = _dot(residual, preconditioned)
        ratio = torch.where(power > 0, new_power / power, 0)
        direction.mul_(ratio).add_(preconditioned)
        power = new_power
    return refitted


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row, [rows, 1]."""
    return (a * b).sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Refitted(Solver):
    """Another solver's masks with refitted values.

    Attributes:
        solver: Chooses the masks.
    """

    solver: Solver

    @property
    def needs(self) -> Needs:
        """X^T X to measure errors, damped to refit, and what the solver reads."""
        return Needs.GRAM | Needs.DAMPED | self.solver.needs

    def solve(
        self,
        hessian: Hessian,
        weight: Tensor,
        pattern: Pattern,
        zeros: Tensor | None = None,
    ) -> Solution:
        """Prune [rows, columns], refit, and keep whichever has the lower error."""
        weight = as_float32(weight)
        first = self.solver.solve(hessian, weight, pattern, zeros)
        refitted = refit(hessian.damped, weight, first.weight)
        errors = [
            relative_error(hessian.gram, weight, solution)
            for solution in (first.weight, refitted)
        ]
        damping = first.outcome.damping or hessian.damping
        best = refitted if errors[1] < errors[0] else first.weight
        return Solution(best, Outcome(min(errors), damping))

    def cost(self, rows: int, columns: int) -> SolverCost:
        """The vectors of conjugate gradients, or what the solver takes."""
        inner = self.solver.cost(rows, columns)
        products = 2 * (STEPS + 4) * rows * columns**2
        return SolverCost(
            max(inner.peak, 8 * rows * columns), inner.operations + products
        )
