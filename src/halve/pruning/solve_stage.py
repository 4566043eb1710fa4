"""Solve the matrices of a stage, and install the solutions in the block."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from halve.calibration_stats import CrossGram
from halve.errors import NumericalError
from halve.layout import PlannedMatrix
from halve.numerics.finite import is_finite
from halve.patterns import is_sparse
from halve.pruning.block_options import BlockOptions
from halve.pruning.distributed.assignment import (
    Owners,
    assign_matrices,
    broadcast_selected,
    reduce_to_owners,
)
from halve.pruning.observe.block_state import BlockState, weight_path
from halve.pruning.observe.collect import GroupInputs
from halve.pruning.observe.input_groups import Group
from halve.pruning.select.selection import CandidateSet, Selected
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.malloc_trim import malloc_trim
from halve.solvers import Hessian
from halve.solvers.correction import corrected_target


def solve_stage(
    state: BlockState,
    model: BlockwiseModel,
    stage: list[GroupInputs],
    options: BlockOptions,
) -> dict[str, Selected]:
    """Prune a stage's groups, each matrix on its owner, and broadcast the solutions."""
    matrices = [m for group_inputs in stage for m in group_inputs.group.matrices]
    owners = assign_matrices(stage, state.ranks)
    stage = reduce_to_owners(stage, owners, state.ranks)
    solved: dict[str, Selected] = {}
    while stage:  # popped, so that a group's Hessian is freed before the next one
        solved |= _solve_group(state, model, stage.pop(0), options, owners)
        malloc_trim()
    selected_by_name: dict[str, Selected] = {}
    for planned in matrices:
        dtype, owner = _dtype(model, planned), owners[planned.name]
        selected = broadcast_selected(
            solved.get(planned.name), dtype, owner, state.ranks
        )
        if owner != state.ranks.rank:
            selected = _install_solution(state, model, planned, selected)
        selected_by_name[planned.name] = selected
    return selected_by_name


def _solve_group(
    state: BlockState,
    model: BlockwiseModel,
    group_inputs: GroupInputs,
    options: BlockOptions,
    owners: Owners,
) -> dict[str, Selected]:
    """Prune this rank's matrices of a group, and install the solutions in the block."""
    hessian = Hessian.of(
        group_inputs.statistic, options.damping, options.needs, options.ridge
    )
    selected_by_name: dict[str, Selected] = {}
    with _naming_group(state, group_inputs.group):
        hessian.prepare(options.needs)
    for index, planned in enumerate(group_inputs.group.matrices):
        if owners[planned.name] != state.ranks.rank:
            continue
        with _naming_group(state, group_inputs.group):
            own = options.candidates_of(planned.name)
            importance = options.importance.get(planned.name)
            candidates = CandidateSet(own, hessian, group_inputs.held_out, importance)
            skipped = planned.name in options.skipped
            drift = None if skipped else group_inputs.drift
            selected = _select(candidates, state.weight(planned), drift, index)
        selected_by_name[planned.name] = _install_solution(
            state, model, planned, selected
        )
        del selected  # it holds a float32 matrix while the next one is solved
    return selected_by_name


@contextmanager
def _naming_group(state: BlockState, group: Group) -> Iterator[None]:
    """Put the group's name in front of numerical errors."""
    try:
        yield
    except NumericalError as error:
        name = f"{state.planned.name}.{group.leader}"
        raise NumericalError(f"{name}: {error.problem}", error.remedy) from error


def _select(
    candidates: CandidateSet,
    weight: Tensor,
    drift: CrossGram | None,
    index: int,
) -> Selected:
    """Prune one matrix with every candidate and select the best solution.

    A function, so that no reference to the dense weight outlives it.
    """

    def target() -> Tensor:
        if drift is None:
            return weight
        return corrected_target(candidates.hessian, weight, drift.drift(index))

    return candidates.solve(weight, target)


def _install_solution(
    state: BlockState, model: BlockwiseModel, planned: PlannedMatrix, selected: Selected
) -> Selected:
    """Install a solution in the block, in the dtype in which it will be stored.

    Returns:
        The selection, its weights being those of the block: there is no second copy.
    """
    dtype, path = _dtype(model, planned), weight_path(planned)
    as_rows, solution = planned.matrix.as_rows, selected.solution
    was_sparse = is_sparse(state.weight(planned))
    # Of what is a view, nothing is free before all slices of its tensor are; what is
    # spilled stays where it is.
    spilled = model.spill is not None and planned.matrix.expert is not None
    in_place = planned.place.index is not None or spilled
    if not in_place:
        state.release(path)  # first: old, new and float32 copies would raise the peak
    # Converted and made contiguous in one step, since each copy is a whole matrix.
    stored = as_rows(solution.weight).to(dtype, memory_format=torch.contiguous_format)
    stored = stored.contiguous()  # `to` copies nothing where the dtype is the same
    if not is_finite(stored):
        raise NumericalError(
            f"The solution for {planned.name} is not finite in {dtype}.",
            "Raise --damping, or calibrate on other text.",
        )
    if in_place:
        state.overwrite(path, stored)
    else:
        state.exchange(path, stored)
    # At a sparsity of 0, a weight that was rounded to 0 may become another value.
    state.solved[path] = selected.candidate.pattern.sparsity > 0 or was_sparse
    if (params := solution.quant_params) is not None:
        state.quant_params[path] = lambda values: as_rows(
            params.fake_quantize_kept(as_rows(values))
        ).contiguous()
    return replace(selected, solution=replace(solution, weight=state.weight(planned)))


def _dtype(model: BlockwiseModel, planned: PlannedMatrix) -> torch.dtype:
    return model.checkpoint.tensors[planned.tensor].dtype
