"""The groups of a block in the order of pruning, with statistics of their inputs."""

from collections.abc import Iterator, Sequence

import torch

from halve.calibration_stats import NoStatistics
from halve.pruning.block_options import BlockOptions
from halve.pruning.observe.activation_cache import (
    ActivationCache,
    cache_dense_inputs,
    is_wide,
)
from halve.pruning.observe.block_state import BlockState
from halve.pruning.observe.collect import GroupInputs, accumulate_deferred, collect
from halve.pruning.observe.expert_statistics import observe_experts
from halve.pruning.observe.input_groups import (
    Group,
    RoutedGroup,
    routed_groups,
    stages,
)
from halve.pruning.observe.routing import RoutedInputs, keep_inputs


def observe_block(
    state: BlockState, options: BlockOptions
) -> Iterator[list[GroupInputs]]:
    """Yield the groups that are pruned together, with statistics of their inputs.

    With error-corrected targets, a stage is observed once the stages before it are
    pruned, by a pass over all windows for each; else all groups in one pass. Experts
    come last, one after the other (`routing`).
    """
    if state.streams is None:
        nothing = NoStatistics(0, torch.device("cpu"))
        options.report("solving")
        for matrix in state.planned.matrices:
            yield [GroupInputs(Group((matrix,)), nothing, None)]
        return
    groups, routed = state.groups(), routed_groups(state.planned)
    dense = _dense_inputs(state, [*groups, *routed], options)
    if dense is None:
        options.report("collecting")
        kept = [
            keep_inputs(state, group, options.budget, options.folder)
            for group in routed
        ]
        yield from _all_at_once(state, groups, options)
        for inputs in kept:
            yield from _expert_after_expert(state, inputs, options)
        return
    for stage in stages(groups, state.width):
        options.report("collecting")
        observed = collect(state, stage, options.statistic, dense)
        options.report("solving")
        yield observed
    for group in routed:
        options.report("collecting")
        inputs = keep_inputs(state, group, options.budget, options.folder, dense)
        yield from _expert_after_expert(state, inputs, options)


def _expert_after_expert(
    state: BlockState, inputs: RoutedInputs, options: BlockOptions
) -> Iterator[list[GroupInputs]]:
    """Yield the groups of each expert, and note how many tokens it has seen."""
    state.expert_tokens[inputs.group.leader] = inputs.tokens
    options.report("solving")
    yield from observe_experts(inputs, options.statistic)


def _all_at_once(
    state: BlockState, groups: list[Group], options: BlockOptions
) -> Iterator[list[GroupInputs]]:
    """Yield all groups, then one by one those whose inputs were deferred."""
    if not groups:  # a block of nothing but experts
        return
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
    state: BlockState, groups: Sequence[Group | RoutedGroup], options: BlockOptions
) -> ActivationCache | None:
    """Advance the dense stream, if there is one; cache what corrections need."""
    if not state.has_dense:
        return None
    needed = groups if options.corrects else []
    cache = cache_dense_inputs(state, needed, options.budget, options.folder)
    return cache if needed else None
