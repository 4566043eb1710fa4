"""Prune one block: observe its inputs, solve each matrix, tune, and propagate."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halve.layout import PlannedBlock
from halve.models import Place
from halve.pruning.block_options import BlockOptions
from halve.pruning.observe.block_state import BlockState, Streams, weight_path
from halve.pruning.observe.output_error import OutputDeviation
from halve.pruning.observe_block import observe_block
from halve.pruning.select.selection import Selected
from halve.pruning.solve_stage import solve_stage
from halve.pruning.tune.block_reconstruction import TuneResult, refine
from halve.runtime.blockwise_model import BlockwiseModel


@dataclass(frozen=True)
class PrunedBlock:
    """A block after pruning.

    Attributes:
        tensors: Checkpoint name -> tensor, for all that has changed, in the
            checkpoint's dtype.
        selected_by_name: The solution that was selected for each matrix, without its
            weights.
        error: Of the outputs of the first batch; None without calibration text.
        refined: Errors before and after tuning; None where the block was not tuned.
        seconds: Wall time.
        expert_tokens: See `BlockRecord`.
    """

    tensors: dict[str, Tensor]
    selected_by_name: dict[str, Selected]
    error: OutputDeviation | None
    refined: TuneResult | None
    seconds: float
    expert_tokens: dict[str, tuple[int, ...]]


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
        selected_by_name: dict[str, Selected] = {}
        for stage in observe_block(state, options):
            selected_by_name |= solve_stage(state, model, stage, options)
        refined = _refine(state, model, options)
        options.report("propagating")
        error = state.advance(before)
        tensors = dict(_stored(state, model))
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)  # until the copies have arrived
        selected = {n: _without_weight(s) for n, s in selected_by_name.items()}
    seconds = time.perf_counter() - started
    return PrunedBlock(tensors, selected, error, refined, seconds, state.expert_tokens)


def _without_weight(selected: Selected) -> Selected:
    """Return a selection without its weights, which are the block's.

    They would keep the block in memory, a GPU's, until it is committed.
    """
    weight = selected.solution.weight.new_empty(0)
    return replace(selected, solution=replace(selected.solution, weight=weight))


def _refine(
    state: BlockState, model: BlockwiseModel, options: BlockOptions
) -> TuneResult | None:
    if options.refining is None:
        return None
    options.report("refining")
    dtypes = model.own_dtypes(state.planned.name)
    for planned in state.planned.matrices:
        if planned.name in options.skipped:
            dtypes.pop(weight_path(planned), None)
    return refine(state, dtypes, options.refining)


def _stored(state: BlockState, model: BlockwiseModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that have changed in a block, in the checkpoint's dtype.

    Where the host has memory to spare, those of a GPU are still being copied to
    page-locked memory when they are yielded.
    """
    spares, name = model.read_ahead is not None, state.planned.name
    places = {path: model.places[f"{name}.{path}"] for path in sorted(state.changed)}
    fused: dict[str, None] = {}
    for path, place in places.items():
        if place.index is not None:
            fused[place.tensor] = None
            continue
        value = _as_stored(state, model, path, place)
        yield place.tensor, value.to("cpu", non_blocking=spares)
    for tensor in fused:
        slices = [
            _as_stored(state, model, path, place)
            for path, place in model.slices(name, tensor)
        ]
        yield tensor, _joined(slices).to("cpu", non_blocking=spares)


def _joined(slices: list[Tensor]) -> Tensor:
    """Return slices of one shape as one tensor; a view where they lie side by side.

    Those of a checkpoint's tensor do, unless their dtype was converted: a second copy
    of all experts of a block would raise the peak.
    """
    first = slices[0]
    starts = (first.data_ptr() + i * first.nbytes for i in range(len(slices)))
    together = all(
        one.data_ptr() == start and one.stride() == first.stride()
        for one, start in zip(slices, starts, strict=True)
    )
    storage = first.untyped_storage().nbytes() - first.storage_offset() * first.itemsize
    if not together or storage < len(slices) * first.nbytes:
        return torch.stack(slices)
    shape, strides = (len(slices), *first.shape), (first.numel(), *first.stride())
    return first.as_strided(shape, strides, first.storage_offset())


def _as_stored(
    state: BlockState, model: BlockwiseModel, path: str, place: Place
) -> Tensor:
    """Return a parameter of the block in the dtype of its tensor."""
    dtype = model.checkpoint.tensors[place.tensor].dtype
    return state.block.get_parameter(path).data.to(dtype)


def install(
    state: BlockState, model: BlockwiseModel, stored: dict[str, Tensor]
) -> None:
    """Install the tensors that an earlier run has stored in a dense block."""
    spilled = model.spilled_tensors(state.planned.index)
    for path, parameter in state.block.named_parameters():
        place = model.places[f"{state.planned.name}.{path}"]
        if place.tensor in stored:  # those shared by blocks are in the first's shard
            value = place.view(stored[place.tensor])
            if place.tensor in spilled:
                state.overwrite(path, value)
            else:
                state.exchange(path, value.to(parameter.device))
