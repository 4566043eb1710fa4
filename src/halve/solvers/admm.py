"""ADMM: choose mask and values together, on the l0-constrained layer problem.

min ||X (W - Z)^T||^2 over matrices Z that obey the pattern is split into a copy B that
knows the error and a copy D that obeys the pattern, tied together by a penalty rho that
grows until the support of D converges (Meng et al., "ALPS: Improved Optimization for
Highly Sparse One-Shot Pruning for Large Language Models" (2024), algorithm 1):

    B = (G - V + rho D) (A + rho I)^-1
    D = project(B + V / rho)
    V = V + rho (B - D)

A is the damped Gram matrix scaled to a unit diagonal, G = W A, and W, B, D are scaled
to match. V accumulates what the projection leaves out: with C = B + V / rho, D equals C
where it is kept, and V equals rho C where it is pruned. So C and its mask are the whole
state of the iteration, and C = W is where it starts.

Differences from the paper: rho takes values of one geometric series, so that the
matrices of a group share the inverses; each inverse is found by Cholesky, and no
eigenvalues are computed; the mask is refitted at the end, and so is that of the largest
|W| scaled, which wins where its error is lower; and within the iteration an
unstructured threshold is estimated from a sample of the weights, to be counted exactly
at the end.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from halve.numerics.matmul import linear
from halve.patterns import NM, Pattern, lowest, pruned_first, with_zeros
from halve.solvers.hessian import Hessian, Needs, relative_error
from halve.solvers.interface import Outcome, Solution, Solver, SolverCost, as_float32
from halve.solvers.refit import refit

# rho of a level is _FIRST * _GROWTH^level. Slower growth loses less and takes longer:
# docs/log.md has the table that these were chosen from.
_FIRST = 0.1
_GROWTH = 1.2
# Iterations between two checks of how far the support moved.
_PERIOD = 3
# (fraction of the kept weights that moved at least, levels to go up by).
_SCHEDULE = ((0.1, 3), (0.005, 2), (0.0, 1))
# The support has converged where a smaller fraction moved.
_CONVERGED = 1e-3
# Weights from which a threshold within the iteration is estimated.
_SAMPLE = 2**14
# Products that a matrix takes, as a rule.
_PRODUCTS = 50


def _rho(level: int) -> float:
    return _FIRST * _GROWTH**level


@dataclass(frozen=True)
class ADMM(Solver):
    """l0-constrained ADMM with a masked refit.

    Attributes:
        max_rounds: Checks of the support after which the iteration stops, converged or
            not; about six is the rule.
        importance: What the squared error of each row counts for, [rows]; None where
            all count alike. It decides which rows an unstructured mask keeps more of,
            and nothing else.
    """

    max_rounds: int = 100
    importance: Tensor | None = field(default=None, compare=False)

    @property
    def needs(self) -> Needs:
        """X^T X to measure errors, damped to refit, scaled to iterate."""
        return Needs.GRAM | Needs.DAMPED | Needs.SCALED

    def solve(
        self,
        hessian: Hessian,
        weight: Tensor,
        pattern: Pattern,
        zeros: Tensor | None = None,
    ) -> Solution:
        """Prune [rows, columns]; about 50 products of it with the Hessian.

        Raises:
            NumericalError: The Hessian is not positive definite.
        """
        weight = as_float32(weight)
        if self.importance is None or isinstance(pattern, NM):
            return self._solve(hessian, weight, pattern, zeros)
        # Errors of rows multiplied by d count d^2 times.
        factors = self.importance.sqrt().unsqueeze(1)
        solution = self._solve(hessian, weight * factors, pattern, zeros).weight
        solution /= factors
        error = relative_error(hessian.gram, weight, solution)
        return Solution(solution, Outcome(error, hessian.damping))

    def weighing(self, importance: Tensor) -> "ADMM":
        """Return the solver for a matrix with rows of such importance."""
        return replace(self, importance=importance)

    def _solve(
        self, hessian: Hessian, weight: Tensor, pattern: Pattern, zeros: Tensor | None
    ) -> Solution:
        scaled = weight.masked_fill(hessian.dead, 0) * hessian.scale
        # Where inputs are nearly uncorrelated, the mask of the largest |W| is best.
        candidates = [
            _refit(hessian, weight, values, _smallest(values, pattern, zeros))
            for values in (scaled, self._iterate(hessian, scaled, pattern, zeros))
        ]
        return min(candidates, key=lambda solution: solution.outcome.error or 0.0)

    def cost(self, rows: int, columns: int) -> SolverCost:
        """A dozen matrices, and some fifty products with the Hessian."""
        size = rows * columns
        return SolverCost(13 * size, 2 * _PRODUCTS * size * columns)

    def _iterate(
        self, hessian: Hessian, weight: Tensor, pattern: Pattern, zeros: Tensor | None
    ) -> Tensor:
        """Return C, scaled, once its support has converged."""
        target = linear(weight, hessian.scaled)  # G = W A
        carried, pruned = weight, _about_smallest(weight, pattern, zeros)
        kept = max(weight.numel() - pattern.count(weight.numel()), 1)
        level = previous = 0
        for _ in range(self.max_rounds):
            before = pruned
            for _ in range(_PERIOD):
                carried = _step(hessian, (previous, level), target, carried, pruned)
                pruned = _about_smallest(carried, pattern, zeros)
                previous = level
            moved = int((before != pruned).sum()) / kept
            if moved < _CONVERGED:
                break
            level += next(up for least, up in _SCHEDULE if moved >= least)
        return carried


def _step(
    hessian: Hessian,
    levels: tuple[int, int],
    target: Tensor,
    carried: Tensor,
    pruned: Tensor,
) -> Tensor:
    """Return the next C.

    Args:
        hessian: Of the group.
        levels: Of the rho with which V was accumulated, and of the one to use now.
        target: G.
        carried: C.
        pruned: Where C is V / rho, and not D.
    """
    old, new = (_rho(level) for level in levels)
    # rho D - V is new * C where kept, and -old * C where pruned.
    pull = (pruned * -(old + new)).add_(new)
    inverse = hessian.shifted_inverse(new)
    free = linear(torch.addcmul(target, carried, pull), inverse)  # B
    # C = B + V / new; V is old * C where pruned, and zero elsewhere.
    return free.addcmul_(carried, pruned * (old / new))


def _refit(
    hessian: Hessian, weight: Tensor, scaled: Tensor, pruned: Tensor
) -> Solution:
    """Return the solution with a given mask, its values refitted.

    Args:
        hessian: Of the group.
        weight: W, [rows, columns].
        scaled: Values to start from, times `hessian.scale`.
        pruned: [rows, columns], True where the solution is zero.
    """
    alive = weight.masked_fill(hessian.dead, 0)
    start = (scaled / hessian.scale).masked_fill_(pruned, 0)
    solution = refit(hessian.damped, alive, start)
    error = relative_error(hessian.gram, weight, solution)
    return Solution(solution, Outcome(error, hessian.damping))


def _smallest(values: Tensor, pattern: Pattern, zeros: Tensor | None) -> Tensor:
    """Return the mask of the smallest values that the pattern prunes, and of zeros."""
    scores = pruned_first(values.abs(), zeros)
    if isinstance(pattern, NM):
        pruned = pattern.mask(scores)
    else:
        pruned = lowest(scores, pattern.count(scores.numel()))
    return with_zeros(pruned, zeros)


def _about_smallest(values: Tensor, pattern: Pattern, zeros: Tensor | None) -> Tensor:
    """Return nearly that mask: an unstructured count is only close to the pattern's."""
    scores = pruned_first(values.abs(), zeros)
    if isinstance(pattern, NM):
        return with_zeros(pattern.mask(scores), zeros)
    # With an odd step the sample visits all columns where their number is even.
    sample = scores.flatten()[:: max(scores.numel() // _SAMPLE, 1) | 1]
    count = max(pattern.count(sample.numel()), 1)
    return with_zeros(scores <= sample.kthvalue(count).values, zeros)
