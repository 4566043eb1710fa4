"""The parts of a run, and what precedes its loop: allocation, embedding, options."""

from dataclasses import asdict, dataclass

from torch import Tensor

from halve.checkpoint import parse_note
from halve.patterns import Patterns
from halve.pruning.allocate.exact_counts import exact_patterns
from halve.pruning.allocate.search import AllocationSearch
from halve.pruning.block_options import BlockOptions
from halve.pruning.distributed.output import RankZeroOutput
from halve.pruning.memory.limit import MemoryPlan
from halve.pruning.observe.block_state import Streams
from halve.pruning.plan import Plan
from halve.pruning.progress import ProgressReporter
from halve.pruning.select.candidates import candidates
from halve.pruning.tune.block_reconstruction import TuneOptions
from halve.records import AllocationRecord
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


def block_patterns(plan: Plan, allocation: AllocationRecord | None) -> list[Patterns]:
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


def block_options(run: Run) -> BlockOptions:
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
