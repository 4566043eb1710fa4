"""Which of several solutions of one matrix is taken: the best on held-out inputs."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from halve.patterns import Pattern
from halve.pruning.evidence import Evidence
from halve.solvers import Outcome, Solution, Solver


@dataclass(frozen=True)
class Choice:
    """A solution, and how it fared against the others.

    Attributes:
        solution: The one that was taken.
        solver: The name of its solver.
        held_out: Its error on held-out inputs, relative to the dense outputs; None
            where no inputs are held out.
        runner_up: That of the next best; None where there was no other.
    """

    solution: Solution
    solver: str
    held_out: float | None = None
    runner_up: float | None = None

    @property
    def outcome(self) -> Outcome:
        """What the solver knows of it."""
        return self.solution.outcome


@dataclass(frozen=True)
class Contest:
    """Solvers that have seen the same inputs.

    Attributes:
        states: Name -> solver and what it prepared.
        evidence: The inputs.
    """

    states: dict[str, tuple[Solver, Any]]
    evidence: Evidence

    @classmethod
    def prepare(cls, solvers: dict[str, Solver], evidence: Evidence) -> "Contest":
        """Let every solver prepare.

        Raises:
            NumericalError: One of them cannot.
        """
        states = {
            name: (solver, solver.prepare(evidence.statistic))
            for name, solver in solvers.items()
        }
        return cls(states, evidence)

    def solve(self, weight: Tensor, target: Tensor, pattern: Pattern) -> Choice:
        """Prune one matrix by every solver and take the best.

        Args:
            weight: The dense matrix, [rows, columns].
            target: What the solvers are given in its place.
            pattern: What the solution shall obey.

        Costs, beside the solvers, one product with the held-out inputs a solution.
        """
        found = [
            Choice(solver.solve(state, target, pattern), name)
            for name, (solver, state) in self.states.items()
        ]
        if not self.evidence.held.pairs:
            assert len(found) == 1, "several solutions and nothing to judge them by"
            return found[0]
        errors = [self.evidence.held.error(weight, c.solution.weight) for c in found]
        ranked = sorted(range(len(found)), key=errors.__getitem__)
        best = found[ranked[0]]
        second = errors[ranked[1]] if len(found) > 1 else None
        return Choice(best.solution, best.solver, errors[ranked[0]], second)
