"""The output as all processes of a run see it: rank 0 writes it and reads it for them.

So the others need no disk in common with it. Nobody waits until a file is written: what
goes wrong there reaches the others as any failure does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from halve.checkpoint import Checkpoint, Workspace, open_workspace
from halve.distributed import Ranks


class RankZeroOutput:
    """A workspace, or none on the ranks that do not write.

    Attributes:
        workspace: The folder in the making; rank 0 alone has it.
        ranks: All who take part.
        done: Shards that an earlier run has written.
        place: `OUT.partial`, wherever it is.
        folder: Where a rank's own mapped files may lie; None for the system's choice,
            where `OUT.partial` is out of this machine's reach.
    """

    def __init__(self, workspace: Workspace | None, ranks: Ranks) -> None:
        self.workspace = workspace
        self.ranks = ranks
        found = ranks.broadcast_object(lambda: _state(workspace))
        self.is_complete, self.done, self._decisions, self.place = found
        self.folder: Path | None = self.place if self.place.is_dir() else None

    def decision(self, name: str) -> dict[str, Any]:
        """Return a decision of an earlier run; empty where there was none."""
        return self._decisions.get(name, {})

    def decide_once(
        self, name: str, decide: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return a decision of this run, made by all ranks together, or an earlier one.

        Args:
            name: Of the decision.
            decide: Makes it, the same on all ranks.
        """
        if name in self._decisions:
            return self._decisions[name]
        decision = decide()
        if self.workspace is not None:
            self.workspace.decide(name, decision)
        return decision

    def read(self, shard: str, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return tensors of a shard that is done."""
        stored = None
        if self.workspace is not None:
            path = self.workspace.folder / shard
            stored = Checkpoint.of_files([path]).read(names)
        return self.ranks.broadcast_tensors(stored)


def _state(
    workspace: Workspace | None,
) -> tuple[bool, set[str], dict[str, dict[str, Any]], Path]:
    assert workspace is not None, "rank 0 has the workspace"
    done, folder = set(workspace.committed), workspace.folder.resolve()
    return workspace.is_complete, done, dict(workspace.decisions), folder


@contextmanager
def open_output(
    out: Path, identity: dict[str, Any], ranks: Ranks
) -> Iterator[RankZeroOutput]:
    """Open the workspace on rank 0, as `open_workspace` does, and tell the others.

    Raises:
        OutputError: As there, on all ranks.
    """
    own = open_workspace(out, identity) if ranks.is_main_process else nullcontext()
    with own as workspace:
        yield RankZeroOutput(workspace, ranks)
