"""Commit one shard in a thread, while the next block is pruned.

The order of the shards and of the writes of each is the same as without a thread: one
is written, read back and recorded before the next one is begun.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

Commit = Callable[[], None]


class CommitQueue:
    """Runs commits one after the other; use it in a `with` block.

    Leaving the block waits for the last commit. If the block raises, that commit is
    completed all the same, so that a resumed run need not repeat it; should it fail as
    well, the block's error is the one that is raised.
    """

    def __init__(self, in_thread: bool) -> None:
        """Start nothing yet.

        Args:
            in_thread: Whether `submit` returns before its commit is complete.
        """
        self._pool = ThreadPoolExecutor(1, "halve-commit") if in_thread else None
        self._last: Future[None] | None = None

    def submit(self, commit: Commit) -> None:
        """Run a commit, after the one before.

        At most one commit is under way, so that at most one block waits in memory.

        Raises:
            HalveError: What this commit raised, without a thread; with one, what the
                commit before raised.
        """
        self.wait()
        if self._pool is None:
            commit()
        else:
            self._last = self._pool.submit(commit)

    def check(self) -> None:
        """Raise what the last commit has raised, if it has ended; do not wait."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last commit, and raise what it has raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> "CommitQueue":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
            else:
                with suppress(Exception):
                    self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
