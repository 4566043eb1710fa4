"""What a progress callback receives."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FinishedBlock:
    """A block that has just been pruned.

    Attributes:
        name: Module path, such as `model.layers.3`.
        error: As in `BlockRecord`.
        seconds: Wall time of pruning it.
        bytes_peak: Peak of the process's memory so far.
    """

    name: str
    error: float | None
    seconds: float
    bytes_peak: int


@dataclass(frozen=True)
class Progress:
    """The state of a running job.

    Attributes:
        block: Zero-based index of the block, or file, that is being processed.
        blocks: Total number of blocks, or files.
        phase: Name of the step that is running on this block.
        seconds_left: Estimated time until the whole job ends; None where there is no
            estimate yet.
        finished: The block, once it is pruned and only has to be written; None in
            every other phase.
    """

    block: int
    blocks: int
    phase: str
    seconds_left: float | None = None
    finished: FinishedBlock | None = None
