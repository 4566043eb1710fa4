"""One block: statistics on its dense weights, then each matrix, then its outputs."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halve.errors import NumericalError
from halve.patterns import Pattern
from halve.plan import PlannedBlock, PlannedMatrix
from halve.pruning.groups import Group, collect, find_groups
from halve.runtime.streamed import Stream, StreamedModel
from halve.solvers import Outcome, Solver
from halve.statistics import Nothing, Statistic


@dataclass(frozen=True)
class Task:
    """What is done to every block.

    Attributes:
        solver: Prunes the matrices.
        pattern: What they shall obey.
        report: Told of each phase.
    """

    solver: Solver
    pattern: Pattern
    report: Callable[[str], None]


@dataclass(frozen=True)
class Pruned:
    """A block after pruning.

    Attributes:
        tensors: Its new matrices, as they will be stored.
        outcomes: What the solver knows of each.
        error: ||Y - Y'|| / ||Y|| of the outputs of the first batch; None without text.
        seconds: Wall time.
    """

    tensors: dict[str, Tensor]
    outcomes: dict[str, Outcome]
    error: float | None
    seconds: float


@torch.no_grad()
def prune_block(
    model: StreamedModel, stream: Stream | None, planned: PlannedBlock, task: Task
) -> Pruned:
    """Prune a block and carry the stream through the pruned block.

    Args:
        model: Holds the dense weights.
        stream: Hidden states that enter the block; afterwards those that leave it.
            None where the solver needs no text.
        planned: The block.
        task: What to do to it.

    Raises:
        NumericalError: Weights, activations or solutions that are not finite.
    """
    begun = time.perf_counter()
    with model.block(planned.index) as block:
        task.report("collecting")
        statistics, dense = _statistics(stream, block, planned, task.solver)
        task.report("solving")
        solved = list(_solve_all(model, block, planned, statistics, task))
        task.report("propagating")
        error = _propagate(stream, block, planned, dense)
    return Pruned(
        tensors={name: stored for name, stored, _ in solved},
        outcomes={name: outcome for name, _, outcome in solved},
        error=error,
        seconds=time.perf_counter() - begun,
    )


def _statistics(
    stream: Stream | None, block: nn.Module, planned: PlannedBlock, solver: Solver
) -> tuple[list[tuple[Group, Statistic]], Tensor | None]:
    """Return each group with its statistic, and the first batch's dense outputs."""
    if stream is None:
        nothing = Nothing(0, torch.device("cpu"))
        return [(Group((matrix,)), nothing) for matrix in planned.matrices], None
    groups = find_groups(stream, block, planned)
    return collect(stream, block, planned, groups, solver.statistic)


def _solve_all(
    model: StreamedModel,
    block: nn.Module,
    planned: PlannedBlock,
    statistics: list[tuple[Group, Statistic]],
    task: Task,
) -> Iterator[tuple[str, Tensor, Outcome]]:
    """Yield each matrix's tensor, its pruned values as stored, and its outcome."""
    while statistics:
        group, statistic = statistics.pop(0)
        state = _prepare(task.solver, statistic, f"{planned.name}.{group.leader}")
        del statistic
        for matrix in group.matrices:
            yield matrix.tensor, *_solve(model, block, matrix, task, state)
        del state  # two square matrices: not to be held beside the next group's


def _prepare(solver: Solver, statistic: Statistic, name: str) -> Any:  # noqa: ANN401
    try:
        return solver.prepare(statistic)
    except NumericalError as error:
        raise NumericalError(f"{name}: {error.problem}", error.remedy) from error


def _solve(
    model: StreamedModel,
    block: nn.Module,
    planned: PlannedMatrix,
    task: Task,
    state: Any,  # noqa: ANN401
) -> tuple[Tensor, Outcome]:
    """Prune one matrix; put it into the block just as it will be stored."""
    weight = _weight(block, planned)
    dense = planned.matrix.as_rows(weight).contiguous()
    solution = task.solver.solve(state, dense, task.pattern)
    dtype = model.checkpoint.tensors[planned.tensor].dtype
    stored = planned.matrix.as_rows(solution.weight).to(dtype).contiguous()
    if not stored.isfinite().all():
        raise NumericalError(
            f"The solution for {planned.tensor} is not finite in {dtype}.",
            "Raise --damping, or calibrate on other text.",
        )
    weight.copy_(stored)
    return stored.cpu(), solution.outcome


def _weight(block: nn.Module, planned: PlannedMatrix) -> Tensor:
    weight = block.get_submodule(planned.matrix.path).weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def install(block: nn.Module, planned: PlannedBlock, stored: dict[str, Tensor]) -> None:
    """Put matrices that an earlier run pruned into a block."""
    for matrix in planned.matrices:
        _weight(block, matrix).copy_(stored[matrix.tensor])


def _propagate(
    stream: Stream | None, block: nn.Module, planned: PlannedBlock, dense: Tensor | None
) -> float | None:
    """Feed the next block; return how far the first batch's outputs moved."""
    if stream is None or dense is None:
        return None
    errors: list[float] = []

    def compare(part: slice, states: Tensor) -> None:
        if part.start == 0:
            errors.append(float((states - dense).norm() / dense.norm()))

    stream.advance(block, planned.index, compare)
    return errors[0]
