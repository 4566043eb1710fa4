"""Write a solver, and compare it with SparseGPT on one matrix.

`halve prune` takes its solvers from the table `halve.solvers.SOLVERS`. To add this one
to Halve, give it a row there and a name in `halve.options.choices`; the tests of
solvers run over the same table.
"""

import torch
from torch import Tensor

from halve.patterns import Pattern, Unstructured, parse_pattern
from halve.solvers import Hessian, Needs, Outcome, Solution, Solver, SolverCost
from halve.solvers.sparsegpt import SparseGPT


class OutputScaledMagnitude(Solver):
    """Zeros the weights with the smallest |w_ij| * ||x_j||, over the whole matrix."""

    @property
    def needs(self) -> Needs:
        """The norms of the inputs, which cost less than the whole Gram matrix."""
        return Needs.DIAGONAL

    def solve(
        self,
        hessian: Hessian,
        weight: Tensor,
        pattern: Pattern,
        zeros: Tensor | None = None,
    ) -> Solution:
        """Return a copy of `weight`, [rows, columns], with its zeros."""
        if not isinstance(pattern, Unstructured) or zeros is not None:
            raise NotImplementedError("only unstructured patterns of dense matrices")
        scores = weight.abs() * hessian.diagonal.sqrt()
        count = int(pattern.sparsity * scores.numel())
        pruned = scores.flatten().argsort(stable=True)[:count]
        solution = weight.clone()
        solution.view(-1)[pruned] = 0
        return Solution(solution, Outcome())

    def cost(self, rows: int, columns: int) -> SolverCost:
        """Scores, and their order as 64-bit integers."""
        return SolverCost(peak=4 * rows * columns)


def layer_error(solver: Solver, weight: Tensor, inputs: Tensor) -> float:
    """Return ||X (W - Z)^T||^2 / ||X W^T||^2 of a solution Z at 50 % zeros."""
    statistic = solver.needs.statistic(inputs.shape[1], inputs.device)
    statistic.add(inputs)
    hessian = Hessian.of(statistic, 0.01, solver.needs)
    solution = solver.solve(hessian, weight, parse_pattern("50%")).weight
    lost = inputs @ (weight - solution).T
    return float(lost.square().sum() / (inputs @ weight.T).square().sum())


torch.manual_seed(0)
# Inputs that have something in common, as hidden states do.
features = torch.randn(2048, 128) + 2 * torch.randn(2048, 1)
matrix = torch.randn(64, 128)
for each in (OutputScaledMagnitude(), SparseGPT()):
    print(f"{type(each).__name__}: {layer_error(each, matrix, features):.4f}")
