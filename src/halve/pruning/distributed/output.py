"""The output of a run with several processes: only rank 0 reads and writes it.

The other ranks therefore need no file system in common with rank 0. No rank waits for a
file to be written: if writing fails, the error reaches the other ranks as any other
error of a rank does.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from halve.checkpoint import Checkpoint, Workspace, open_workspace
from halve.distributed import Ranks


@dataclass(frozen=True)
class RankZeroOutput:
    """The output as one rank sees it.

    Attributes:
        workspace: The folder that is being written on rank 0; None on the others.
        ranks: All processes of the run.
        is_complete: Whether an earlier run wrote everything but did not rename it.
        done: Shards that an earlier run committed.
        decisions: What earlier runs decided, by name.
        place: Path of `OUT.partial` on the machine of rank 0.
        folder: Where this rank puts memory-mapped files: `place`, or None for the
            system's default where this machine has no such folder.
    """

    workspace: Workspace | None
    ranks: Ranks
    is_complete: bool
    done: frozenset[str]
    decisions: dict[str, dict[str, Any]]
    place: Path
    folder: Path | None

    @classmethod
    def of(cls, workspace: Workspace | None, ranks: Ranks) -> "RankZeroOutput":
        """Broadcast the state of rank 0's workspace; all ranks must call this."""
        state = ranks.broadcast_object(lambda: _state(workspace))
        is_complete, done, decisions, place = state
        folder = place if place.is_dir() else None
        return cls(workspace, ranks, is_complete, done, decisions, place, folder)

    def decision(self, name: str) -> dict[str, Any]:
        """Return a decision of an earlier run; an empty one where there is none."""
        return self.decisions.get(name, {})

    def decide_once(
        self, name: str, decide: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return an earlier run's decision, or make it now and record it.

        Args:
            name: Name of the decision in the ledger.
            decide: Makes the decision. Called by all ranks together, and must return
                the same on each.
        """
        if name in self.decisions:
            return self.decisions[name]
        decision = decide()
        if self.workspace is not None:
            self.workspace.decide(name, decision)
        return decision

    def read(self, shard: str, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Read tensors of a committed shard on rank 0 and broadcast them."""
        stored = None
        if self.workspace is not None:
            path = self.workspace.path(shard)
            stored = Checkpoint.of_files([path]).read(names)
        return self.ranks.broadcast_tensors(stored)


def _state(
    workspace: Workspace | None,
) -> tuple[bool, frozenset[str], dict[str, dict[str, Any]], Path]:
    assert workspace is not None, "rank 0 has the workspace"
    done, folder = frozenset(workspace.committed), workspace.folder.resolve()
    return workspace.is_complete, done, dict(workspace.decisions), folder


@contextmanager
def open_output(
    out: Path,
    identity: dict[str, Any],
    files: Mapping[str, tuple[str, ...]],
    ranks: Ranks,
) -> Iterator[RankZeroOutput]:
    """Open the workspace on rank 0 and broadcast its state; see `open_workspace`.

    Raises:
        OutputError: See `open_workspace`; raised on all ranks.
    """
    is_main = ranks.is_main_process
    context = open_workspace(out, identity, files) if is_main else nullcontext()
    with context as workspace:
        yield RankZeroOutput.of(workspace, ranks)
