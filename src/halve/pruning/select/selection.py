"""Which of several solutions of one matrix is taken: the best on held-out inputs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

from torch import Tensor

from halve.grids import QuantScheme
from halve.patterns import Pattern, is_sparse
from halve.pruning.observe.collect import HeldOut
from halve.solvers import Hessian, Needs, Outcome, Solution, Solver


@dataclass(frozen=True)
class Candidate:
    """A way to prune a matrix.

    Attributes:
        name: As the record will show it.
        solver: What prunes the matrix.
        pattern: What the solution must obey.
        grid: Quantization scheme of its weights; None where they are not quantized.
    """

    name: str
    solver: Solver
    pattern: Pattern
    grid: QuantScheme | None = None


# Tensor -> ways to prune it.
OwnCandidates = Mapping[str, tuple[Candidate, ...]]


def combined_needs(candidates: Iterable[Candidate]) -> Needs:
    """Return what the solvers of all candidates together read of the inputs."""
    return reduce(or_, (c.solver.needs for c in candidates), Needs.NOTHING)


@dataclass(frozen=True)
class Selected:
    """The solution that was selected for a matrix, and how it compares.

    Attributes:
        solution: The solution.
        candidate: Where it comes from.
        held_out: Its error on held-out inputs (`HeldOut.errors`); None where no inputs
            are held out.
        runner_up: That of the next best; None where there was no other.
    """

    solution: Solution
    candidate: Candidate
    held_out: float | None = None
    runner_up: float | None = None

    @property
    def outcome(self) -> Outcome:
        """What the solver reports of the solution."""
        return self.solution.outcome


@dataclass(frozen=True)
class CandidateSet:
    """Candidates for a matrix.

    Attributes:
        candidates: The ways to prune a matrix.
        hessian: Of its inputs, shared by all candidates.
        held_out: Inputs that no candidate is fitted to, and that decide between them.
        importance: Of the matrix's rows, [rows]; None where all count alike.
    """

    candidates: tuple[Candidate, ...]
    hessian: Hessian
    held_out: HeldOut
    importance: Tensor | None = None

    def solve(self, weight: Tensor, target: Callable[[], Tensor]) -> Selected:
        """Prune one matrix with every candidate and select the best solution.

        Of a matrix that was pruned before, the zeros stay zeros.

        Args:
            weight: The dense matrix, [rows, columns], as it is stored.
            target: Returns what the solvers are given in its place. Called here, so
                that no reference to it outlives the solvers.

        Cost:
            Beside the solvers, one product with the held-out inputs for each solution.
        """
        zeros = weight == 0 if is_sparse(weight) else None
        solved = self._solutions(target(), zeros)
        if not self.held_out.pairs:
            assert len(solved) == 1, "several candidates and nothing to select them by"
            return solved[0]
        solutions = [selected.solution.weight for selected in solved]
        errors = self.held_out.errors(weight, solutions, self.importance)
        first, *others = sorted(range(len(solved)), key=errors.__getitem__)
        second = errors[others[0]] if others else None
        return replace(solved[first], held_out=errors[first], runner_up=second)

    def _solutions(self, target: Tensor, zeros: Tensor | None) -> list[Selected]:
        solved = []
        for candidate in self.candidates:
            solver, pattern = candidate.solver, candidate.pattern
            if self.importance is not None:
                solver = solver.weighing(self.importance)
            solution = solver.solve(self.hessian, target, pattern, zeros)
            solved.append(Selected(solution, candidate))
        return solved
