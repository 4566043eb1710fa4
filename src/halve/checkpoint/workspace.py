"""The folder that a run writes to: `OUT.partial`, renamed to `OUT` when complete.

The order of the writes is the guarantee. A shard is renamed into place before its line
is appended to the ledger; shards that are merged into one file are removed after the
line of that file; `halve.json` is written after all other files; renaming the folder is
the last step. So `OUT` is either absent or complete, and a run that is killed
at any point is resumed from its ledger, to the same bytes. Where no rename can replace
`OUT` (see `work_folder`), its files are moved up one by one, `halve.json` last.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from halve.checkpoint import disk
from halve.checkpoint.checkpoint import Checkpoint
from halve.checkpoint.files import (
    make_folders,
    merge_shards,
    read_back_errors,
    sha256,
    write_errors,
    write_shard,
    write_text,
)
from halve.checkpoint.ledger import LEDGER, Committed, Ledger
from halve.checkpoint.lock import lock_folder
from halve.checkpoint.output import (
    RECORD,
    check_available,
    check_identity,
    not_written_by_halve,
    record_of_work,
    recorded_identity,
)
from halve.checkpoint.side_files import write_side_files
from halve.checkpoint.work_folder import partial_path
from halve.errors import OutputError

Describe = Callable[[Path], dict[str, Any]]

# The decision of the ledger that names the saved state, and its files.
_STATE = "state"
_STATE_FILES = ("state-0.safetensors", "state-1.safetensors")


class Workspace:
    """The locked folder of a run; use `open_workspace` to get one.

    Attributes:
        out: Path of the finished output.
        folder: Where files are written; see `partial_path`.
        identity: What determines the output; a run with another one cannot resume.
        committed: Completed shards, by name.
        digests: SHA-256 of each completed file of the output, by name.
        decisions: Decisions that the blocks depend on, by name.
    """

    def __init__(
        self,
        out: Path,
        identity: dict[str, Any],
        files: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.out = out
        self.folder = partial_path(out)
        self.identity = identity
        self.committed: dict[str, Committed] = {}
        self.digests: dict[str, str] = {}
        self.decisions: dict[str, dict[str, Any]] = {}
        self._files = files
        self._ledger = Ledger(self.folder)

    @property
    def is_complete(self) -> bool:
        """Whether an earlier run wrote every file and ended before the last rename."""
        return record_of_work(self.out) is not None

    def commit(
        self, file: str, tensors: dict[str, Tensor], describe: Describe
    ) -> dict[str, Any]:
        """Write a shard, check it, and append it to the ledger.

        If it was the last one of an output file that is made of several shards, these
        are merged.

        Args:
            file: Name of the shard.
            tensors: The contents of the shard.
            describe: Receives the path of the written file and returns the note to
                record, or raises if the file is not as it should be.

        Returns:
            The note.

        Raises:
            OutputError: The file cannot be written, or not be read back.
        """
        digest = write_shard(self.folder / file, tensors)
        with read_back_errors(self.folder / file):
            note = describe(self.folder / file)
        shard = Committed(file, digest, note)
        self._ledger.add_shard(shard)
        self.committed[file] = shard
        self._complete(self._file_of(file))
        return note

    def path(self, shard: str) -> Path:
        """Return the file that holds a committed shard."""
        file = self._file_of(shard)
        return self.folder / (file if file in self.digests else shard)

    @property
    def formats(self) -> set[str]:
        """Names of the packed formats in the completed files."""
        return Checkpoint.of_files(
            [self.folder / file for file in self.digests]
        ).formats

    def decide(self, name: str, decision: dict[str, Any]) -> None:
        """Record a decision; it replaces an earlier one of the same name."""
        self._ledger.add_decision(name, decision)
        self.decisions[name] = decision

    def save_state(self, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Write what a later run resumes from, in the place of what was saved before.

        Two files take turns, so that one is whole at any time. `finish` removes them.

        Args:
            tensors: The state.
            note: Values that belong to it; JSON.
        """
        before = self.decisions.get(_STATE)
        file = _STATE_FILES[0 if before is None else 1 - before["number"]]
        digest = write_shard(self.folder / file, tensors)
        number = _STATE_FILES.index(file)
        self.decide(_STATE, {"number": number, "sha256": digest, "note": note})

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the state that was saved last, and its note; None if there is none."""
        decision = self.decisions.get(_STATE)
        if decision is None:
            return None
        path = self.folder / _STATE_FILES[decision["number"]]
        if not _is_intact(path, decision["sha256"]):
            return None
        state = Checkpoint.of_files([path])
        return state.read(state.tensors), decision["note"]

    def add_side_files(
        self,
        source: Path,
        quantization: dict[str, Any] | None = None,
        changes: Mapping[str, int] | None = None,
    ) -> dict[str, str]:
        """Write the index, and copy the side files of the source model.

        Args:
            source: Folder of the source model.
            quantization: The `quantization_config` for config.json; None for a model
                without packed matrices.
            changes: Entries of config.json -> new values.

        Returns:
            File name -> SHA-256.
        """
        return write_side_files(
            self.folder, self.digests, source, quantization, changes
        )

    def finish(self, record: str) -> None:
        """Write `halve.json`, the last file, and rename the folder to `OUT`.

        Args:
            record: The text of `halve.json`.
        """
        self._remove_states()
        write_text(self.folder / RECORD, record)
        self.publish()

    def publish(self) -> None:
        """Remove the ledger of a complete folder, and put its files in place."""
        try:
            with write_errors(self.out):
                disk.remove(self.folder / LEDGER)
                disk.sync(self.folder)
                if self.folder.parent == self.out:
                    self._move_up()
                else:
                    disk.rename(self.folder, self.out)
                    disk.sync(self.out.parent)
        except OutputError as error:
            whole = f"All files are complete in {self.folder}."
            raise OutputError(f"{error.problem} {whole}", error.remedy) from error

    def _move_up(self) -> None:
        """Move all files from the work folder to its parent, the record last."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == RECORD):
            target = self.out / path.name
            if target.exists():
                raise FileExistsError(f"{target} exists")
            if path.name == RECORD:  # which stands for all other files
                disk.sync(self.out)
            disk.rename(path, target)
        disk.sync(self.out)
        disk.remove_folder(self.folder)
        disk.sync(self.out)

    def _file_of(self, shard: str) -> str:
        """Return the output file that a shard becomes, or becomes part of."""
        return next(file for file, shards in self._files.items() if shard in shards)

    def _complete(self, file: str) -> None:
        """Complete an output file, if all of its shards are committed.

        The shards of a merged file are removed after its line is in the ledger.
        """
        shards = self._files[file]
        if any(shard not in self.committed for shard in shards):
            return
        if shards == (file,):
            self.digests[file] = self.committed[file].sha256
            return
        paths = [self.folder / shard for shard in shards]
        if file not in self.digests:
            digest = merge_shards(self.folder / file, paths)
            self._ledger.add_shard(Committed(file, digest, {"merged": list(shards)}))
            self.digests[file] = digest
        with write_errors(self.folder):
            for path in paths:
                if path.exists():
                    disk.remove(path)

    def _resume(self) -> None:
        """Take over the work of an earlier run with the same identity, if any."""
        entries = self._ledger.read()
        if entries.identity is None:
            self._start()
            return
        check_identity(self.folder, entries.identity, self.identity)
        self.decisions = entries.decisions
        self._remove_temporary_files()
        recorded = {shard.file: shard for shard in entries.shards}
        for file, shards in self._files.items():
            merged = len(shards) > 1 and self._has(recorded.get(file))
            if merged:
                self.digests[file] = recorded[file].sha256
            for shard in (recorded[name] for name in shards if name in recorded):
                if merged or self._has(shard):
                    self.committed[shard.file] = shard
            self._complete(file)

    def _has(self, entry: Committed | None) -> bool:
        """Whether the folder holds an intact file for an entry of the ledger."""
        return entry is not None and _is_intact(self.folder / entry.file, entry.sha256)

    def _start(self) -> None:
        """Write the first line of the ledger into a folder that holds nothing else."""
        others = [p.name for p in self.folder.iterdir() if p.name != LEDGER]
        if others and not self.is_complete:
            raise not_written_by_halve(self.folder, f"it contains {others[0]}")
        self._ledger.start(self.identity)
        with write_errors(self.folder):
            disk.sync(self.folder)

    def _remove_states(self) -> None:
        """Remove what was saved to resume from: everything else is written."""
        with write_errors(self.folder):
            for path in (self.folder / file for file in _STATE_FILES):
                if path.exists():
                    disk.remove(path)

    def _remove_temporary_files(self) -> None:
        """Remove the files that a killed run did not rename into place."""
        with write_errors(self.folder):
            for path in self.folder.rglob(".*.tmp"):
                disk.remove(path)


@contextmanager
def open_workspace(
    out: Path, identity: dict[str, Any], files: Mapping[str, tuple[str, ...]]
) -> Iterator[Workspace]:
    """Create or resume `OUT.partial`, and hold its lock.

    Args:
        out: Path of the finished output; must not exist, or be an empty folder.
        identity: What determines the output. Must equal the identity of the run whose
            work is found in the folder.
        files: Output file -> the shards that it is made of, in order: only itself, or
            several that are merged.

    Raises:
        OutputError: `OUT` exists; another process holds the lock; the folder holds the
            work of a run with another identity, or was not written by Halve; or it
            cannot be written.
    """
    check_available(out)
    workspace = Workspace(out, identity, files)
    with write_errors(workspace.folder):
        make_folders(workspace.folder)
    with lock_folder(workspace.folder):
        check_available(out)  # another run may have finished in the meantime
        if (record := record_of_work(out)) is not None:
            found = recorded_identity(record.parent)
            check_identity(workspace.folder, found, identity)
        else:
            workspace._resume()
        yield workspace


def _is_intact(path: Path, digest: str) -> bool:
    """Whether a file can be read and has the recorded SHA-256."""
    try:
        return path.is_file() and sha256(path) == digest
    except OSError:
        return False
