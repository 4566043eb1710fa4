"""Which of several solutions of one matrix is taken: the best on held-out inputs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from halve.calibration_stats import GramMatrix, Statistic
from halve.grids import QuantScheme
from halve.patterns import Pattern
from halve.pruning.observe.collect import GroupInputs
from halve.solvers import Outcome, Solution, Solver


@dataclass(frozen=True)
class Candidate:
    """A way to prune a matrix.

    Attributes:
        name: As it will stand in the record.
        solver: What prunes it.
        pattern: What the solution shall obey.
        grid: What its weights are rounded to, if they are.
    """

    name: str
    solver: Solver
    pattern: Pattern
    grid: QuantScheme | None = None


@dataclass(frozen=True)
class Selected:
    """A solution, and how it fared against the others.

    Attributes:
        solution: The one that was taken.
        candidate: Where it comes from.
        held_out: Its error on held-out inputs, relative to the dense outputs; None
            where no inputs are held out.
        runner_up: That of the next best; None where there was no other.
    """

    solution: Solution
    candidate: Candidate
    held_out: float | None = None
    runner_up: float | None = None

    @property
    def outcome(self) -> Outcome:
        """What the solver knows of it."""
        return self.solution.outcome


@dataclass(frozen=True)
class CandidateSet:
    """Candidates that have seen the same inputs.

    Attributes:
        states: Each candidate and what its solver prepared.
        group_inputs: The inputs.
    """

    states: list[tuple[Candidate, Any]]
    group_inputs: GroupInputs

    @classmethod
    def prepare(
        cls, candidates: Iterable[Candidate], group_inputs: GroupInputs
    ) -> "CandidateSet":
        """Let every solver prepare.

        Raises:
            NumericalError: One of them cannot.
        """
        ways = tuple(candidates)
        shared, statistic = len(ways) > 1, group_inputs.statistic
        return cls(
            [(c, _prepare(c.solver, statistic, shared)) for c in ways], group_inputs
        )

    def solve(
        self, weight: Tensor, target: Tensor, pattern: Pattern | None = None
    ) -> Selected:
        """Prune one matrix in every way and take the best.

        Args:
            weight: The dense matrix, [rows, columns], as it is stored.
            target: What the solvers are given in its place.
            pattern: What solutions shall obey, in place of the candidates' own.

        Costs, beside the solvers, one product with the held-out inputs a solution.
        """
        states = self.states
        if pattern is not None:
            states = [(replace(c, pattern=pattern), state) for c, state in states]
        found = [
            Selected(
                candidate.solver.solve(state, target, candidate.pattern), candidate
            )
            for candidate, state in states
        ]
        if not self.group_inputs.held_out.pairs:
            assert len(found) == 1, "several solutions and nothing to judge them by"
            return found[0]
        solutions = [selected.solution.weight for selected in found]
        errors = self.group_inputs.held_out.errors(weight, solutions)
        first, *others = sorted(range(len(found)), key=errors.__getitem__)
        second = errors[others[0]] if others else None
        return replace(found[first], held_out=errors[first], runner_up=second)


def _prepare(solver: Solver, statistic: Statistic, shared: bool) -> Any:  # noqa: ANN401
    """Let a solver prepare with as much of a statistic as it wants.

    Where others want it too, it is lent one that it may not take for itself.
    """
    if shared or not isinstance(statistic, solver.statistic):
        assert isinstance(statistic, GramMatrix), (
            "only a Gram matrix knows all the others"
        )
        statistic = solver.statistic.of(statistic.matrix())
    return solver.prepare(statistic)
