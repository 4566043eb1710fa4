"""Prune one block: observe its inputs, solve each matrix, tune, and propagate."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from halve.calibration_stats import CrossGram, NoStatistics, Statistic
from halve.errors import NumericalError
from halve.layout import PlannedBlock, PlannedMatrix
from halve.numerics.finite import is_finite
from halve.patterns import Pattern, Patterns
from halve.pruning.distributed.assignment import (
    Owners,
    assign_matrices,
    broadcast_selected,
    reduce_to_owners,
)
from halve.pruning.observe.activation_cache import (
    ActivationCache,
    cache_dense_inputs,
    is_wide,
)
from halve.pruning.observe.block_state import BlockState, Streams, weight_path
from halve.pruning.observe.collect import GroupInputs, accumulate_deferred, collect
from halve.pruning.observe.input_groups import Group, stages
from halve.pruning.select.selection import (
    Candidate,
    CandidateSet,
    Selected,
    combined_needs,
)
from halve.pruning.tune.block_reconstruction import TuneOptions, TuneResult, refine
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.malloc_trim import malloc_trim
from halve.solvers import Hessian, Needs
from halve.solvers.correction import corrected_target


@dataclass(frozen=True)
class BlockOptions:
    """What is done to every block.

    Attributes:
        candidates: Ways to prune a matrix; of several, the one with the lowest error on
            held-out inputs is selected.
        damping: Fraction of the mean diagonal that is added to Gram matrices.
        corrects: Whether the groups of a block are pruned in order, for error-corrected
            targets; else all at once, for the outputs of the dense matrices on the same
            inputs.
        refining: How the block is tuned after pruning; None to leave it.
        budget: Bytes of the dense model's inputs that may be cached in memory.
        folder: Where memory-mapped files are created past that; None for the system's
            temporary folder.
        report: Called with the name of each phase.
        patterns: Tensor -> what it must obey, in place of the candidates' patterns.
        deferred: Whether the widest inputs are spilled and summed later (`MemoryPlan`).
    """

    candidates: tuple[Candidate, ...]
    damping: float
    corrects: bool
    refining: TuneOptions | None
    budget: int
    folder: Path | None
    report: Callable[[str], None]
    patterns: Patterns = field(default_factory=dict)
    deferred: bool = False

    @property
    def needs(self) -> Needs:
        """What solvers and corrections read of the inputs."""
        needs = combined_needs(self.candidates)
        return needs | Needs.FACTOR if self.corrects else needs

    @property
    def statistic(self) -> type[Statistic]:
        """The calibration statistic that suffices for that."""
        return self.needs.statistic


@dataclass(frozen=True)
class PrunedBlock:
    """A block after pruning.

    Attributes:
        tensors: Checkpoint name -> tensor, for all that has changed, in the
            checkpoint's dtype.
        selected_by_tensor: The solution that was selected for each matrix.
        error: ||Y - Y'|| / ||Y|| of the outputs of the first batch; None without
            calibration text.
        refined: Errors before and after tuning; None where the block was not tuned.
        seconds: Wall time.
    """

    tensors: dict[str, Tensor]
    selected_by_tensor: dict[str, Selected]
    error: float | None
    refined: TuneResult | None
    seconds: float


@torch.no_grad()
def prune_block(
    model: BlockwiseModel,
    streams: Streams | None,
    planned: PlannedBlock,
    options: BlockOptions,
) -> PrunedBlock:
    """Prune a block and carry all hidden states through it.

    Args:
        model: Holds the dense weights.
        streams: Hidden states that enter the block; afterwards those that leave it.
            None where the solver needs no calibration text.
        planned: The block.
        options: What to do to it.

    Raises:
        NumericalError: Weights, activations or solutions that are not finite.
    """
    started = time.perf_counter()
    with model.block(planned.index) as block:
        state = BlockState(block, planned, streams)
        before = state.first_outputs()
        selected_by_tensor: dict[str, Selected] = {}
        for stage in _observe(state, options):
            selected_by_tensor |= _solve_stage(state, model, stage, options)
        refined = _refine(state, model, options)
        options.report("propagating")
        error = state.advance(before)
        tensors = dict(_stored(state, model))
    return PrunedBlock(
        tensors, selected_by_tensor, error, refined, time.perf_counter() - started
    )


def _observe(state: BlockState, options: BlockOptions) -> Iterator[list[GroupInputs]]:
    """Yield the groups that are pruned together, with statistics of their inputs.

    With error-corrected targets, a stage is observed once the stages before it are
    pruned, by a pass over all windows for each; else all groups in one pass.
    """
    if state.streams is None:
        nothing = NoStatistics(0, torch.device("cpu"))
        options.report("solving")
        for matrix in state.planned.matrices:
            yield [GroupInputs(Group((matrix,)), nothing, None)]
        return
    groups = state.groups()
    dense = _dense_inputs(state, groups, options)
    if dense is None:
        yield from _all_at_once(state, groups, options)
        return
    for stage in stages(groups, state.width):
        options.report("collecting")
        observed = collect(state, stage, options.statistic, dense)
        options.report("solving")
        yield observed


def _all_at_once(
    state: BlockState, groups: list[Group], options: BlockOptions
) -> Iterator[list[GroupInputs]]:
    """Yield all groups, then one by one those whose inputs were deferred."""
    wide = [g for g in groups if options.deferred and is_wide(g.columns, state.width)]
    deferred = ActivationCache.allocate(
        state.stream, state.planned.name, wide, 0, options.folder
    )
    options.report("collecting")
    observed = collect(state, groups, options.statistic, deferred=deferred)
    options.report("solving")
    yield observed
    for group in wide:
        options.report("summing")
        observed = [accumulate_deferred(state, group, options.statistic, deferred)]
        options.report("solving")
        yield observed


def _dense_inputs(
    state: BlockState, groups: list[Group], options: BlockOptions
) -> ActivationCache | None:
    """Advance the dense stream, if there is one; cache what corrections need."""
    if not state.has_dense:
        return None
    needed = groups if options.corrects else []
    cache = cache_dense_inputs(state, needed, options.budget, options.folder)
    return cache if needed else None


def _solve_stage(
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
    selected_by_tensor: dict[str, Selected] = {}
    for planned in matrices:
        dtype, owner = _dtype(model, planned), owners[planned.tensor]
        selected = broadcast_selected(
            solved.get(planned.tensor), dtype, owner, state.ranks
        )
        if owner != state.ranks.rank:
            selected = _install_solution(state, model, planned, selected)
        selected_by_tensor[planned.tensor] = selected
    return selected_by_tensor


def _solve_group(
    state: BlockState,
    model: BlockwiseModel,
    group_inputs: GroupInputs,
    options: BlockOptions,
    owners: Owners,
) -> dict[str, Selected]:
    """Prune this rank's matrices of a group, and install the solutions in the block."""
    hessian = Hessian.of(group_inputs.statistic, options.damping, options.needs)
    candidates = CandidateSet(options.candidates, hessian, group_inputs.held_out)
    selected_by_tensor: dict[str, Selected] = {}
    with _naming_group(state, group_inputs.group):
        hessian.prepare(options.needs)
    for index, planned in enumerate(group_inputs.group.matrices):
        if owners[planned.tensor] != state.ranks.rank:
            continue
        with _naming_group(state, group_inputs.group):
            pattern = options.patterns.get(planned.tensor)
            selected = _select(
                candidates, state.weight(planned), group_inputs.drift, index, pattern
            )
        selected_by_tensor[planned.tensor] = _install_solution(
            state, model, planned, selected
        )
        del selected  # it holds a float32 matrix while the next one is solved
    return selected_by_tensor


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
    pattern: Pattern | None,
) -> Selected:
    """Prune one matrix with every candidate and select the best solution.

    A function, so that no reference to the dense weight outlives it.
    """

    def target() -> Tensor:
        if drift is None:
            return weight
        return corrected_target(candidates.hessian, weight, drift.drift(index))

    return candidates.solve(weight, target, pattern)


def _install_solution(
    state: BlockState, model: BlockwiseModel, planned: PlannedMatrix, selected: Selected
) -> Selected:
    """Install a solution in the block, in the dtype in which it will be stored.

    Returns:
        The selection, its weights being those of the block: there is no second copy.
    """
    dtype, path = _dtype(model, planned), weight_path(planned)
    as_rows, solution = planned.matrix.as_rows, selected.solution
    state.release(path)  # first: old, new and float32 copies would raise the peak
    # Converted and made contiguous in one step, since each copy is a whole matrix.
    stored = as_rows(solution.weight).to(dtype, memory_format=torch.contiguous_format)
    stored = stored.contiguous()  # `to` copies nothing where the dtype is the same
    if not is_finite(stored):
        raise NumericalError(
            f"The solution for {planned.tensor} is not finite in {dtype}.",
            "Raise --damping, or calibrate on other text.",
        )
    state.exchange(path, stored)
    # At a sparsity of 0, a weight that was rounded to 0 may become another value.
    state.solved[path] = selected.candidate.pattern.sparsity > 0
    if (params := solution.quant_params) is not None:
        state.quant_params[path] = lambda values: as_rows(
            params.fake_quantize(as_rows(values))
        ).contiguous()
    return replace(selected, solution=replace(solution, weight=state.weight(planned)))


def _dtype(model: BlockwiseModel, planned: PlannedMatrix) -> torch.dtype:
    return model.checkpoint.tensors[planned.tensor].dtype


def _refine(
    state: BlockState, model: BlockwiseModel, options: BlockOptions
) -> TuneResult | None:
    if options.refining is None:
        return None
    options.report("refining")
    return refine(state, model.own_dtypes(state.planned.name), options.refining)


def _stored(state: BlockState, model: BlockwiseModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that have changed in a block, in the checkpoint's dtype."""
    for path in sorted(state.changed):
        tensor = model.tensors[f"{state.planned.name}.{path}"]
        dtype = model.checkpoint.tensors[tensor].dtype
        yield tensor, state.block.get_parameter(path).data.to(dtype).cpu()


def install(
    state: BlockState, model: BlockwiseModel, stored: dict[str, Tensor]
) -> None:
    """Install the tensors that an earlier run has stored in a dense block."""
    for path, parameter in state.block.named_parameters():
        tensor = model.tensors[f"{state.planned.name}.{path}"]
        if tensor in stored:  # tensors shared by blocks are in the first one's shard
            state.exchange(path, stored[tensor].to(parameter.device))
