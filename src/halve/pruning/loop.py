"""The loop over the blocks of a plan: prune each one, or replay what is committed.

A block is committed before the next one starts, so an interrupted run loses at most one
block. On a GPU it is committed while the next one is pruned, so a process that is
killed loses at most two. What precedes the loop is in `run`, what happens within a
block in `prune_block`.
"""

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from halve.checkpoint import Workspace, parse_note
from halve.layout import PlannedBlock
from halve.numerics.precision import FULL_PRECISION, matmul_precision
from halve.pruning.allocate.exact_counts import check_total, total_zeros
from halve.pruning.block_options import BlockOptions
from halve.pruning.commit_queue import CommitQueue
from halve.pruning.decisions import (
    Decisions,
    allocate,
    decide,
    drop_experts,
    own_candidates,
)
from halve.pruning.importance import Importance, ImportanceRun
from halve.pruning.observe.block_state import BlockState, Streams
from halve.pruning.prune_block import install, prune_block
from halve.pruning.run import (
    Run,
    block_options,
    overlaps_files,
    reading_ahead,
    sized_for_gpu,
    start_streams,
)
from halve.pruning.select.selection import OwnCandidates
from halve.pruning.write import write_block, write_outside_blocks
from halve.records import BlockRecord, FinishedBlock
from halve.system import peak_memory


def prune_blocks(
    run: Run, windows: Tensor | None
) -> tuple[tuple[BlockRecord, ...], Decisions]:
    """Write every shard of a plan that is not committed yet.

    Args:
        run: The plan and its surroundings.
        windows: Calibration tokens, [samples, length], int64; None where no solver
            needs text.

    Returns:
        Records of all blocks (empty on ranks other than 0), and what trials decided.
    """
    run, device = sized_for_gpu(run), run.model.device
    # Passes may compute with less; nothing else does, whatever the caller has set.
    with matmul_precision(FULL_PRECISION, device):
        run, experts = drop_experts(run, windows)
        if run.plan.options.only_drops_experts:
            windows = None  # nothing else depends on text
        records, decisions = _prune_what_is_left(run, windows)
    return records, replace(decisions, experts=experts)


def _prune_what_is_left(
    run: Run, windows: Tensor | None
) -> tuple[tuple[BlockRecord, ...], Decisions]:
    """Prune a model whose experts are those that stay."""
    with reading_ahead(run) as ahead:
        decisions = decide(ahead, windows)
        importance = _importance(ahead, windows)
        decisions = replace(decisions, zeros=allocate(ahead, importance.saliency))
        streams = None if windows is None else start_streams(ahead, windows)
        if run.output.workspace is not None:
            write_outside_blocks(run.plan, run.model, run.output.workspace)
        _prune_all(ahead, streams, own_candidates(ahead, decisions), importance.rows)
    if run.output.workspace is None:
        return (), decisions
    records = _records(run, run.output.workspace)
    if decisions.allocation is not None:
        check_total(run.plan, total_zeros(run.plan), records)
    if decisions.zeros is not None:
        check_total(run.plan, sum(decisions.zeros.zeros.values()), records)
    return records, decisions


def _importance(run: Run, windows: Tensor | None) -> Importance:
    """Return what matters, unless nothing depends on it or nothing is left to prune.

    All ranks measure it, and take the rows of rank 0, since processors differ in last
    bits.
    """
    options, layout = run.plan.options, run.plan.layout
    samples = options.row_samples
    is_done = all(block.shard in run.output.done for block in layout.blocks)
    if windows is None or not samples or layout.has_experts or is_done:
        return Importance()
    # The last windows are held out: nothing is fitted to them.
    fitted = windows[: min(samples, len(windows) - options.held_out)]
    report, folder = run.progress.report, run.output.folder
    importance = ImportanceRun(
        run.model, layout.blocks, fitted, run.budget, folder, report
    ).measure()
    for rows in importance.rows.values():
        run.output.ranks.broadcast_(rows)
    return importance


def _prune_all(
    run: Run,
    streams: Streams | None,
    every: Iterable[OwnCandidates],
    importance: dict[str, Tensor],
) -> None:
    """Prune or replay all blocks, each with what its matrices get."""
    options = replace(block_options(run), importance=importance)
    with CommitQueue(overlaps_files(run)) as commits:
        for planned, own in zip(run.plan.layout.blocks, every, strict=True):
            if planned.shard in run.output.done:
                commits.wait()  # which may be merging the shard into another file
                _replay(run, streams, planned)
            else:
                ways = {**own, **options.own}  # rules come first
                _prune(run, streams, planned, replace(options, own=ways), commits)


def _prune(
    run: Run,
    streams: Streams | None,
    planned: PlannedBlock,
    options: BlockOptions,
    commits: CommitQueue,
) -> None:
    """Prune a block, carry the streams through it, and commit its shard."""

    def report(phase: str, finished: FinishedBlock | None = None) -> None:
        commits.check()  # a full disk ends the run here, not a block later
        run.progress.report(planned.index, phase, finished)

    run.progress.start_block(planned.index)
    pruned = prune_block(run.model, streams, planned, replace(options, report=report))
    error = None if pruned.error is None else pruned.error.overall
    finished = FinishedBlock(planned.name, error, pruned.seconds, peak_memory())
    report("writing", finished)
    if (workspace := run.output.workspace) is not None:
        commits.submit(
            lambda: write_block(run.plan, run.model, workspace, planned, pruned)
        )


def _replay(run: Run, streams: Streams | None, planned: PlannedBlock) -> None:
    """Carry the streams through a block that an earlier run committed."""
    run.progress.report(planned.index, "catching up")
    if streams is None:
        return
    names = run.plan.layout.shards[planned.shard]
    spilled = run.model.spilled_tensors(planned.index)
    together = tuple(name for name in names if name not in spilled)
    with run.model.block(planned.index) as block:
        state = BlockState(block, planned, streams)
        if state.has_dense:  # while the block still has its dense weights
            state.dense_stream.advance(block, planned.index)
        for part in (together, *((name,) for name in spilled)):
            install(state, run.model, run.output.read(planned.shard, part))
        state.stream.advance(block, planned.index)


def _records(run: Run, workspace: Workspace) -> tuple[BlockRecord, ...]:
    """Return the records of all blocks, as the ledger holds them."""
    return tuple(
        parse_note(run.output.place, BlockRecord, workspace.committed[block.shard].note)
        for block in run.plan.layout.blocks
    )
