"""One block: what its matrices see, each matrix in turn, the block as a whole."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from halve.calibration_stats import GramMatrix, NoStatistics, Statistic
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
from halve.pruning.select.selection import Candidate, CandidateSet, Selected
from halve.pruning.tune.block_reconstruction import TuneOptions, TuneResult, refine
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.malloc_trim import malloc_trim
from halve.solvers.correction import Correction


@dataclass(frozen=True)
class BlockOptions:
    """What is done to every block.

    Attributes:
        candidates: Ways to prune a matrix; of several the best on held-out inputs wins.
        correction: Damping of error-corrected targets; None to prune all matrices of a
            block at once, for the targets of the dense block on the same inputs.
        refining: How the block is tuned afterwards, if it is.
        budget: Bytes of the dense model's inputs that may live in memory.
        folder: Where a mapped file lies past that.
        report: Told of each phase.
        patterns: What single matrices shall obey, in place of the candidates' own.
        deferred: As of `MemoryPlan`.
    """

    candidates: tuple[Candidate, ...]
    correction: float | None
    refining: TuneOptions | None
    budget: int
    folder: Path | None
    report: Callable[[str], None]
    patterns: Patterns = field(default_factory=dict)
    deferred: bool = False

    @property
    def statistic(self) -> type[Statistic]:
        """What the solvers need to know of the inputs."""
        if self.correction is not None or len(self.candidates) > 1:
            return GramMatrix
        return next(iter(self.candidates)).solver.statistic


@dataclass(frozen=True)
class PrunedBlock:
    """A block after pruning.

    Attributes:
        tensors: What has changed in it, as it will be stored.
        selected_by_tensor: For each matrix the solution that was taken.
        error: ||Y - Y'|| / ||Y|| of the outputs of the first batch; None without text.
        refined: What refining brought, if it was asked for.
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
        streams: Hidden states that enter the block; afterwards those that leave it. None
            where the solver needs no text.
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
    """Yield groups that are pruned together, with what is known of their inputs.

    Where targets are corrected that is only gathered once the stages before it are
    pruned, and so by a pass for each; else by one pass of the dense block.
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
        found = collect(state, stage, options.statistic, dense)
        options.report("solving")
        yield found


def _all_at_once(
    state: BlockState, groups: list[Group], options: BlockOptions
) -> Iterator[list[GroupInputs]]:
    """Yield all groups; by themselves those whose inputs are summed later."""
    wide = [g for g in groups if options.deferred and is_wide(g.columns, state.width)]
    deferred = ActivationCache.allocate(
        state.stream, state.planned.name, wide, 0, options.folder
    )
    options.report("collecting")
    found = collect(state, groups, options.statistic, deferred=deferred)
    options.report("solving")
    yield found
    for group in wide:
        options.report("summing")
        found = [accumulate_deferred(state, group, options.statistic, deferred)]
        options.report("solving")
        yield found


def _dense_inputs(
    state: BlockState, groups: list[Group], options: BlockOptions
) -> ActivationCache | None:
    """Carry the dense stream on, if there is one; keep what corrections need."""
    if not state.has_dense:
        return None
    wanted = groups if options.correction is not None else []
    kept = cache_dense_inputs(state, wanted, options.budget, options.folder)
    return kept if wanted else None


def _solve_stage(
    state: BlockState,
    model: BlockwiseModel,
    stage: list[GroupInputs],
    options: BlockOptions,
) -> dict[str, Selected]:
    """Prune groups, each matrix where it is dealt to; afterwards all ranks have all."""
    matrices = [m for group_inputs in stage for m in group_inputs.group.matrices]
    owners = assign_matrices(stage, state.ranks)
    stage = reduce_to_owners(stage, owners, state.ranks)
    own: dict[str, Selected] = {}
    while stage:  # what a group's solutions needed is gone when the next is begun
        own |= _solve_group(state, model, stage.pop(0), options, owners)
        malloc_trim()
    selected_by_tensor: dict[str, Selected] = {}
    for planned in matrices:
        dtype, owner = _dtype(model, planned), owners[planned.tensor]
        selected = broadcast_selected(
            own.get(planned.tensor), dtype, owner, state.ranks
        )
        if owner != state.ranks.rank:
            selected = _put(state, model, planned, selected)
        selected_by_tensor[planned.tensor] = selected
    return selected_by_tensor


def _solve_group(
    state: BlockState,
    model: BlockwiseModel,
    group_inputs: GroupInputs,
    options: BlockOptions,
    owners: Owners,
) -> dict[str, Selected]:
    """Prune this rank's matrices of a group, and put them into the block so."""
    name = f"{state.planned.name}.{group_inputs.group.leader}"
    try:
        correction = _correction(group_inputs, options)
        candidate_set = CandidateSet.prepare(options.candidates, group_inputs)
    except NumericalError as error:
        raise NumericalError(f"{name}: {error.problem}", error.remedy) from error
    selected_by_tensor: dict[str, Selected] = {}
    for index, planned in enumerate(group_inputs.group.matrices):
        if owners[planned.tensor] == state.ranks.rank:
            target = partial(correction.target, index) if correction else None
            pattern = options.patterns.get(planned.tensor)
            selected = _solve(state.weight(planned), target, candidate_set, pattern)
            selected_by_tensor[planned.tensor] = _put(state, model, planned, selected)
            del selected  # in float32, while the next one is looked for
    return selected_by_tensor


def _solve(
    stored: Tensor,
    target: Callable[[Tensor], Tensor] | None,
    candidate_set: CandidateSet,
    pattern: Pattern | None,
) -> Selected:
    """Prune one matrix, given as it lies in the block."""
    return candidate_set.solve(stored, target(stored) if target else stored, pattern)


def _correction(group_inputs: GroupInputs, options: BlockOptions) -> Correction | None:
    if group_inputs.drift is None or options.correction is None:
        return None
    assert isinstance(group_inputs.statistic, GramMatrix)
    return Correction.of(group_inputs.statistic, group_inputs.drift, options.correction)


def _put(
    state: BlockState, model: BlockwiseModel, planned: PlannedMatrix, selected: Selected
) -> Selected:
    """Put a matrix into the block, rounded to what will be stored.

    Returns:
        The choice, whose weights are those in the block: there is no second copy.
    """
    dtype, path = _dtype(model, planned), weight_path(planned)
    own, solution = planned.matrix.as_rows, selected.solution
    state.release(path)  # before there is another: matrices are dear
    # In one piece at once, since copies of such a matrix are dear.
    rounded = own(solution.weight).to(dtype, memory_format=torch.contiguous_format)
    rounded = rounded.contiguous()  # where it had that dtype
    if not is_finite(rounded):
        raise NumericalError(
            f"The solution for {planned.tensor} is not finite in {dtype}.",
            "Raise --damping, or calibrate on other text.",
        )
    state.exchange(path, rounded)
    # Where none is pruned, a weight that was rounded to 0 may come back.
    state.solved[path] = selected.candidate.pattern.sparsity > 0
    if (quant_params := solution.quant_params) is not None:
        state.quant_params[path] = lambda values: own(
            quant_params.fake_quantize(own(values))
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
    """Yield what has changed in a block: tensors of the checkpoint, in its dtype."""
    for path in sorted(state.changed):
        tensor = model.tensors[f"{state.planned.name}.{path}"]
        dtype = model.checkpoint.tensors[tensor].dtype
        yield tensor, state.block.get_parameter(path).data.to(dtype).cpu()


def install(
    state: BlockState, model: BlockwiseModel, stored: dict[str, Tensor]
) -> None:
    """Put what an earlier run has stored into a block that is dense."""
    for path, parameter in state.block.named_parameters():
        tensor = model.tensors[f"{state.planned.name}.{path}"]
        if tensor in stored:  # what other blocks share lies in the shard of the first
            state.exchange(path, stored[tensor].to(parameter.device))
