"""The loop over the blocks of a plan: prune each one, or replay what is committed.

A block is committed before the next one starts, so an interrupted run loses at most one
block. What precedes the loop (allocation, embedding) and what the blocks share is set
up here too; what happens within a block is in `prune_block`.
"""

from dataclasses import asdict, dataclass, replace

from torch import Tensor

from halve.checkpoint import Workspace, parse_note
from halve.layout import PlannedBlock
from halve.patterns import Patterns
from halve.pruning.allocate.exact_counts import check_total, exact_patterns
from halve.pruning.allocate.search import AllocationSearch
from halve.pruning.distributed.output import RankZeroOutput
from halve.pruning.memory.limit import MemoryPlan
from halve.pruning.observe.block_state import BlockState, Streams
from halve.pruning.plan import Plan
from halve.pruning.progress import ProgressReporter
from halve.pruning.prune_block import BlockOptions, install, prune_block
from halve.pruning.select.candidates import candidates
from halve.pruning.tune.block_reconstruction import TuneOptions
from halve.pruning.write import write_block, write_outside_blocks
from halve.records import AllocationRecord, BlockRecord
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.stream import Stream


@dataclass(frozen=True)
class Run:
    """What every step of a run needs.

    Attributes:
        plan: What to do.
        model: The dense model, read block by block.
        output: Where shards are committed and read back.
        memory_plan: What may stay in memory.
        progress: Receives every phase.
    """

    plan: Plan
    model: BlockwiseModel
    output: RankZeroOutput
    memory_plan: MemoryPlan
    progress: ProgressReporter

    @property
    def budget(self) -> int:
        """Bytes in memory allowed for each stream, and for all cached inputs."""
        return self.memory_plan.activations // self.plan.options.activation_parts


def prune_blocks(
    run: Run, windows: Tensor | None
) -> tuple[tuple[BlockRecord, ...], AllocationRecord | None]:
    """Write every shard of a plan that is not committed yet.

    Args:
        run: The plan and its surroundings.
        windows: Calibration tokens, [samples, length], int64; None where no solver
            needs text.

    Returns:
        Records of all blocks (empty on ranks other than 0), and of the allocation;
        None where all blocks are pruned alike.
    """
    allocation = choose_allocation(run, windows)
    streams = None if windows is None else start_streams(run, windows)
    if run.output.workspace is not None:
        write_outside_blocks(run.plan, run.model, run.output.workspace)
    options = _block_options(run)
    every = _patterns(run.plan, allocation)
    for planned, patterns in zip(run.plan.layout.blocks, every, strict=True):
        if planned.shard in run.output.done:
            _replay(run, streams, planned)
        else:
            _prune(run, streams, planned, replace(options, patterns=patterns))
    if run.output.workspace is None:
        return (), allocation
    records = _records(run, run.output.workspace)
    if allocation is not None:
        check_total(run.plan, records)
    return records, allocation


def choose_allocation(run: Run, windows: Tensor | None) -> AllocationRecord | None:
    """Return the sparsities of the blocks, searched for unless the ledger has them.

    Returns:
        The decision of this or of an earlier, interrupted run; None where all blocks
        are pruned alike.

    Cost:
        See `AllocationSearch.choose`: up to four runs with SparseGPT.
    """
    if not run.plan.options.allocation_held_out:
        return None
    assert windows is not None, "the search for an allocation needs text"
    search = AllocationSearch(
        plan=run.plan,
        model=run.model,
        windows=windows,
        memory_plan=run.memory_plan,
        folder=run.output.folder,
        report=run.progress.report,
        ranks=run.output.ranks,
    )
    chosen = run.output.decide_once("allocation", lambda: asdict(search.choose()))
    return parse_note(run.output.place, AllocationRecord, chosen)


def _patterns(plan: Plan, allocation: AllocationRecord | None) -> list[Patterns]:
    """Return the patterns of each block's matrices; empty where all are alike."""
    if allocation is None:
        return [{} for _ in plan.layout.blocks]
    return exact_patterns(plan, allocation.sparsities)


def start_streams(run: Run, windows: Tensor) -> Streams:
    """Run the model up to its first block, for this rank's part of the windows.

    The dense stream starts as a copy of the pruned one: they differ only once a block
    has been pruned.
    """
    options = run.plan.options
    stream = Stream.start(
        run.model,
        windows,
        run.budget,
        run.output.folder,
        options.held_out,
        run.output.ranks,
    )
    if not options.has_dense:
        return Streams(stream)
    return Streams(stream, stream.fork(run.budget, run.output.folder))


def _block_options(run: Run) -> BlockOptions:
    """Return what is done alike to every block."""
    options = run.plan.options
    tuning = TuneOptions(options.epochs, options.seed) if options.refine else None
    return BlockOptions(
        candidates=candidates(options, run.plan.layout.dtype),
        damping=options.damping,
        corrects=options.corrects,
        refining=tuning,
        budget=run.budget,
        folder=run.output.folder,
        report=lambda _: None,
        deferred=run.memory_plan.deferred,
    )


def _prune(
    run: Run, streams: Streams | None, planned: PlannedBlock, options: BlockOptions
) -> None:
    """Prune a block, carry the streams through it, and commit its shard."""

    def report(phase: str) -> None:
        run.progress.report(planned.index, phase)

    run.progress.start_block(planned.index)
    pruned = prune_block(run.model, streams, planned, replace(options, report=report))
    report("writing")
    if run.output.workspace is not None:
        write_block(run.plan, run.model, run.output.workspace, planned, pruned)


def _replay(run: Run, streams: Streams | None, planned: PlannedBlock) -> None:
    """Carry the streams through a block that an earlier run committed."""
    run.progress.report(planned.index, "catching up")
    if streams is None:
        return
    names = run.plan.layout.shards[planned.shard]
    stored = run.output.read(planned.shard, names)
    with run.model.block(planned.index) as block:
        state = BlockState(block, planned, streams)
        if state.has_dense:  # while the block still has its dense weights
            state.dense_stream.advance(block, planned.index)
        install(state, run.model, stored)
        state.stream.advance(block, planned.index)


def _records(run: Run, workspace: Workspace) -> tuple[BlockRecord, ...]:
    """Return the records of all blocks, as the ledger holds them."""
    return tuple(
        parse_note(run.output.place, BlockRecord, workspace.committed[block.shard].note)
        for block in run.plan.layout.blocks
    )
