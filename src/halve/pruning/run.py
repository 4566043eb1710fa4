"""The parts of a run, and what precedes its loop: embedding, options."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from halve.pruning.block_options import BlockOptions
from halve.pruning.distributed.output import RankZeroOutput
from halve.pruning.memory.forecast import forecast_run
from halve.pruning.memory.limit import MemoryPlan
from halve.pruning.observe.block_state import Streams
from halve.pruning.plan import Plan
from halve.pruning.progress import ProgressReporter
from halve.pruning.rules import ruled_candidates, skipped_matrices
from halve.pruning.select.candidates import candidates
from halve.pruning.tune.block_reconstruction import TuneOptions
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.memory_left import gpu_nbytes
from halve.runtime.read_ahead import ReadAhead
from halve.runtime.stream import Stream
from halve.system import available_memory

# One in so many parts of a GPU's memory is left free for fragments.
_GPU_MARGIN = 10
# Blocks that the host's memory must have room for where files are overlapped. torch
# allocates page-locked memory in powers of two, so some count twice.
_BLOCKS_ON_HOST = 8


@dataclass(frozen=True)
class Run:
    """What every step of a run needs.

    Attributes:
        plan: What to do.
        model: The dense model, read block by block.
        output: Where shards are committed and read back.
        memory_plan: What may stay in memory.
        progress: Receives every phase.
        overlaps: Whether files may be read and written in threads while a GPU computes,
            which takes the host's memory of a few blocks. Changes no result.
        trust_remote_code: Whether Python code that comes with the model may run.
    """

    plan: Plan
    model: BlockwiseModel
    output: RankZeroOutput
    memory_plan: MemoryPlan
    progress: ProgressReporter
    overlaps: bool = False
    trust_remote_code: bool = False

    @property
    def budget(self) -> int:
        """Bytes in memory allowed for each stream, and for all cached inputs."""
        return self.memory_plan.activations // self.plan.activation_parts


def sized_for_gpu(run: Run) -> Run:
    """Return the run with a model that leaves free what a GPU needs for a block.

    Hidden states stay on the GPU only where they leave room for the largest phase of a
    block, of which the forecast counts small batches, for one large batch, and for a
    tenth of the GPU's memory, which fragments take.
    """
    model = run.model
    if model.reserve is None:  # on the CPU, or after its memory was exhausted
        return run
    phases = forecast_run(run.plan).phases
    reserve = (
        max(phase.bytes for phase in phases)
        + model.batch_nbytes(model.batch_tokens)
        + gpu_nbytes(model.device) // _GPU_MARGIN
    )
    return replace(run, model=replace(model, reserve=reserve))


@contextmanager
def reading_ahead(run: Run) -> Iterator[Run]:
    """Let the run's model read the next block in a thread, where that helps.

    Yields:
        The run with such a model, or, where files are not overlapped, the run itself.
    """
    if not overlaps_files(run):
        yield run
        return
    ahead = ReadAhead(run.model.checkpoint.read, run.model.device)
    try:
        yield replace(run, model=replace(run.model, read_ahead=ahead))
    finally:
        ahead.close()


def overlaps_files(run: Run) -> bool:
    """Whether files are read and written in threads while blocks are pruned.

    That is on a GPU, where the host has nothing else to do and memory to spare: for
    the next block, as it is read and page-locked; and for the last one, page-locked,
    serialised, and read back.
    """
    if not run.overlaps or run.model.device.type != "cuda":
        return False
    return available_memory() >= _BLOCKS_ON_HOST * run.model.block_nbytes()


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
        ridge=options.diagonal_ridge,
        corrects=options.corrects,
        refining=tuning,
        budget=run.budget,
        folder=run.output.folder,
        report=lambda _: None,
        deferred=run.memory_plan.deferred,
        own=ruled_candidates(run.plan.layout, options),
        skipped=skipped_matrices(run.plan.layout, options),
    )
