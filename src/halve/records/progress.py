"""What a progress callback receives."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The state of a running job.

    Attributes:
        block: Zero-based index of the block, or file, that is being processed.
        blocks: Total number of blocks, or files.
        phase: Name of the step that is running on this block.
        seconds_left: Estimated time until the whole job ends; None where there is no
            estimate yet.
    """

    block: int
    blocks: int
    phase: str
    seconds_left: float | None = None
