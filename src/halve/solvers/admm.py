"""ADMM: choose mask and values together, on the l0-constrained layer problem.

min ||X (W - Z)^T||^2 over matrices Z that obey the pattern is split into a copy B that
knows the error and a copy D that obeys the pattern, held together by a penalty rho that
grows until the support of D settles (Meng et al., "ALPS: Improved Optimization for
Highly Sparse One-Shot Pruning for Large Language Models" (2024), algorithm 1):

    B = (G - V + rho D) (A + rho I)^-1
    D = project(B + V / rho)
    V = V + rho (B - D)

A is the damped Gram matrix scaled to a unit diagonal, G = W A, and W, B, D are scaled
to match. What is left out of D is what V adds up: with C = B + V / rho, D is C where it
is kept, and V is rho C where it is pruned. So C and its mask are all that is carried,
and C = W is the beginning.

Otherwise than published: rho takes values of one geometric series, so that the matrices
of a group share the inverses; each is found by Cholesky, and no eigenvalues are
computed; the mask is refitted at the end, and so is that of the largest |W| scaled,
which wins where its error is lower; and within the iteration an unstructured threshold
is taken from a sample of the weights, to be counted exactly at the end.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from halve.calibration_stats import GramMatrix
from halve.errors import NumericalError
from halve.numerics.matmul import linear
from halve.patterns import NM, Pattern, lowest
from halve.solvers.hessian import damped, relative_error
from halve.solvers.interface import Outcome, Solution, Solver, SolverCost, as_float32
from halve.solvers.refit import refit

# rho of a level is _FIRST * _GROWTH^level. Slower growth loses less and takes longer:
# docs/log.md has the table that these were chosen from.
_FIRST = 0.1
_GROWTH = 1.2
# Iterations between two looks at how the support moved.
_PERIOD = 3
# Levels to go up by, where at least this share of the kept weights moved.
_SCHEDULE = ((0.1, 3), (0.005, 2), (0.0, 1))
# The support has settled where a smaller share moved.
_SETTLED = 1e-3
# Weights from which a threshold within the iteration is taken.
_SAMPLE = 2**14
# Levels that a group goes through, and products a matrix takes, as a rule.
_LEVELS, _PRODUCTS = 8, 50
# Inverses that a group keeps for its next matrix, in bytes.
_KEPT_BYTES = 2**30


@dataclass
class Prepared:
    """What the matrices of a group share.

    Attributes:
        gram: X^T X, [columns, columns], undamped.
        hessian: The same, damped.
        scale: [columns], the square roots of the Hessian's diagonal.
        system: The Hessian scaled to a unit diagonal.
        dead: [columns], True for inputs that are always zero.
        damping: The share of the mean diagonal that was added.
        inverses: Level -> (system + rho I)^-1, as many as may be kept.
    """

    gram: Tensor
    hessian: Tensor
    scale: Tensor
    system: Tensor
    dead: Tensor
    damping: float
    inverses: dict[int, Tensor] = field(default_factory=dict)

    def inverse(self, level: int) -> Tensor:
        """Return (system + rho I)^-1 for a level of rho; columns^3 operations."""
        if level in self.inverses:
            return self.inverses[level]
        shifted = self.system.clone()
        shifted.diagonal().add_(_penalty(level))
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if failed or not lower.diagonal().isfinite().all():
            raise NumericalError(
                "The Gram matrix is not positive definite.",
                "Raise --damping, or calibrate on other or more text.",
            )
        inverse = torch.cholesky_inverse(lower)
        if (len(self.inverses) + 1) * inverse.nbytes <= _KEPT_BYTES:
            self.inverses[level] = inverse
        return inverse


def _penalty(level: int) -> float:
    return _FIRST * _GROWTH**level


@dataclass(frozen=True)
class ADMM(Solver[GramMatrix, Prepared]):
    """l0-constrained ADMM with a masked refit.

    Attributes:
        damping: Share of the mean diagonal of H that is added to its diagonal.
        most_rounds: Looks at the support after which the iteration stops, settled or
            not; some six is the rule.
    """

    statistic: ClassVar = GramMatrix
    damping: float = 0.01
    most_rounds: int = 100

    def prepare(self, statistic: GramMatrix) -> Prepared:
        """Scale the Hessian to a unit diagonal; columns^2 operations."""
        gram = statistic.matrix()
        dead = gram.diagonal() == 0
        hessian = damped(gram, dead, self.damping)
        scale = hessian.diagonal().sqrt()
        system = hessian / scale / scale[:, None]
        return Prepared(gram, hessian, scale, system, dead, self.damping)

    def solve(self, state: Prepared, weight: Tensor, pattern: Pattern) -> Solution:
        """Prune [rows, columns]; about 50 products of it with the Hessian.

        Raises:
            NumericalError: The Hessian is not positive definite.
        """
        weight = as_float32(weight)
        scaled = weight.masked_fill(state.dead, 0) * state.scale
        # Where inputs hardly depend on each other the first mask is the best one.
        candidates = [
            self._refit(state, weight, values, _pruned_exactly(values, pattern))
            for values in (scaled, self._iterate(state, scaled, pattern))
        ]
        return min(candidates, key=lambda found: found.outcome.error or 0.0)

    def work(self, rows: int, columns: int) -> SolverCost:
        """Two Hessians and the inverses; another in the making, or a dozen matrices."""
        square, size = columns**2, rows * columns
        inverses = min(_LEVELS * square, _KEPT_BYTES // 4)
        return SolverCost(
            state=2 * square + inverses,
            peak=max(3 * square, 12 * size),
            once=2 * _LEVELS * columns**3,
            each=2 * _PRODUCTS * size * columns,
        )

    def _refit(
        self, state: Prepared, weight: Tensor, scaled: Tensor, pruned: Tensor
    ) -> Solution:
        alive = weight.masked_fill(state.dead, 0)
        start = (scaled / state.scale).masked_fill_(pruned, 0)
        solution = refit(state.hessian, alive, start)
        error = relative_error(state.gram, weight, solution)
        return Solution(solution, Outcome(error, state.damping))

    def _iterate(self, state: Prepared, weight: Tensor, pattern: Pattern) -> Tensor:
        """Return C, scaled, once its support has settled."""
        target = linear(weight, state.system)
        carried, pruned = weight, _pruned_about(weight, pattern)
        kept = max(weight.numel() - pattern.count(weight.numel()), 1)
        level = before = 0
        for _ in range(self.most_rounds):
            mask = pruned
            for _ in range(_PERIOD):
                carried = _step(state, (before, level), target, carried, pruned)
                pruned = _pruned_about(carried, pattern)
                before = level
            moved = int((mask != pruned).sum()) / kept
            if moved < _SETTLED:
                break
            level += next(up for least, up in _SCHEDULE if moved >= least)
        return carried


def _step(
    state: Prepared,
    levels: tuple[int, int],
    target: Tensor,
    carried: Tensor,
    pruned: Tensor,
) -> Tensor:
    """Return the next C.

    Args:
        state: Of the group.
        levels: Of the rho with which V was summed, and of the one to use now.
        target: G.
        carried: C.
        pruned: Where C is V / rho, and not D.
    """
    old, new = (_penalty(level) for level in levels)
    pull = (pruned * -(old + new)).add_(new)  # times C: rho D - V
    free = linear(torch.addcmul(target, carried, pull), state.inverse(levels[1]))
    return free.addcmul_(carried, pruned * (old / new))


def _pruned_exactly(values: Tensor, pattern: Pattern) -> Tensor:
    """Return which of the values go: the smallest."""
    scores = values.abs()
    if isinstance(pattern, NM):
        return pattern.mask(scores)
    return lowest(scores, pattern.count(scores.numel()))


def _pruned_about(values: Tensor, pattern: Pattern) -> Tensor:
    """Do the same, but an unstructured count is only near to the pattern's."""
    scores = values.abs()
    if isinstance(pattern, NM):
        return pattern.mask(scores)
    # An odd step meets all columns where their number is even.
    sample = scores.flatten()[:: max(scores.numel() // _SAMPLE, 1) | 1]
    count = max(pattern.count(sample.numel()), 1)
    return scores <= sample.kthvalue(count).values
