"""Progress of a run: its block and phase, and how long the rest will take."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from halve.records import FinishedBlock, Progress
from halve.runtime.malloc_trim import malloc_trim


@dataclass(frozen=True)
class ProgressReporter:
    """Reports phases, with the time left as estimated from the blocks done so far.

    Attributes:
        callback: Called with a `Progress` at the start of every phase.
        blocks: Number of blocks in the model.
        started: Block index -> `time.monotonic()` at which it was started. Holds only
            blocks pruned by this process, not those replayed from an earlier run.
    """

    callback: Callable[[Progress], None]
    blocks: int
    started: dict[int, float] = field(default_factory=dict)

    def start_block(self, block: int) -> None:
        """Record that pruning of a block starts now."""
        self.started[block] = time.monotonic()

    def report(
        self, block: int, phase: str, finished: FinishedBlock | None = None
    ) -> None:
        """Report the start of a phase, after returning freed memory to the system."""
        malloc_trim()
        left = self._seconds_left(block)
        self.callback(Progress(block, self.blocks, phase, left, finished))

    def _seconds_left(self, block: int) -> float | None:
        """Extrapolate from the mean time per block; None during the first block."""
        done = len(self.started) - 1
        if done < 1:
            return None
        pace = (self.started[block] - next(iter(self.started.values()))) / done
        elapsed = time.monotonic() - self.started[block]
        return max(pace * (self.blocks - block) - elapsed, 0.0)
