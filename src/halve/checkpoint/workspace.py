"""A folder in the making: `OUT.partial`, which becomes `OUT` by one rename.

The order of writes is the promise. A shard is renamed into place before its line is
added to the ledger; `halve.json` comes after everything else; the rename of the folder
comes last. So `OUT` is absent or whole, and a run that was killed anywhere is resumed
from its ledger to the same bytes.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from halve.checkpoint import disk
from halve.checkpoint.checkpoint import Checkpoint
from halve.checkpoint.files import (
    copy_file,
    make_folders,
    read_errors,
    sha256,
    write_errors,
    write_shard,
    write_text,
)
from halve.checkpoint.output import (
    RECORD,
    check_free,
    check_identity,
    foreign_folder,
    partial_of,
    recorded_identity,
)
from halve.errors import CheckpointError, OutputError
from halve.records.codec import from_dict
from halve.untrusted import is_inside, parse_json, read_bytes

_LEDGER = "ledger.jsonl"
_INDEX = "model.safetensors.index.json"
_QUANTIZATION = "quantization_config"
# What travels along with the weights: config, tokenizer, generation settings, licence.
_SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
_SIDE_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")

Describe = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class Committed:
    """A shard that is on the disk.

    Attributes:
        file: Its name.
        sha256: Of its bytes.
        note: What was recorded with it.
    """

    file: str
    sha256: str
    note: dict[str, Any]


class Workspace:
    """The locked folder of a run.

    Attributes:
        folder: `OUT.partial`.
        committed: Shards that are done, by file name.
        decisions: What was decided before the first block, by name.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out = out
        self.folder = partial_of(out)
        self.identity = identity
        self.committed: dict[str, Committed] = {}
        self.decisions: dict[str, dict[str, Any]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether an earlier run wrote everything and died before the last rename."""
        return (self.folder / RECORD).is_file()

    def commit(
        self, file: str, tensors: dict[str, Tensor], describe: Describe
    ) -> dict[str, Any]:
        """Write a shard and then its line in the ledger.

        Args:
            file: Its name.
            tensors: All of its contents.
            describe: Given the path of what was written, returns the note to record,
                or raises where it is not as it should be.

        Returns:
            The note.

        Raises:
            OutputError: It cannot be written, or not be read again.
        """
        digest = write_shard(self.folder / file, tensors)
        with _read_back(self.folder / file):
            note = describe(self.folder / file)
        self._append({"file": file, "sha256": digest, "note": note})
        self.committed[file] = Committed(file, digest, note)
        return note

    def decide(self, name: str, decision: dict[str, Any]) -> None:
        """Note a decision, in the place of an earlier one of the same name."""
        self._append({"settled": name, "decision": decision})
        self.decisions[name] = decision

    def add_side_files(
        self, source: Path, quantization: dict[str, Any] | None = None
    ) -> dict[str, str]:
        """Write the index and all that travels along with the weights.

        Args:
            source: Folder of the model that the side files come from.
            quantization: What config.json says of packed matrices, if there are any.

        Returns:
            File -> SHA-256.
        """
        with _read_back(self.folder / _INDEX):
            index = _index(self.folder, self.committed)
        write_text(self.folder / _INDEX, index)
        names = [path.name for path in side_files(source)]
        for name in names:
            copy_file(source / name, self.folder / name)
        _set_quantization(self.folder / "config.json", quantization)
        with read_errors(self.folder):
            return {name: sha256(self.folder / name) for name in (_INDEX, *names)}

    def finish(self, record: str) -> None:
        """Write `halve.json`, the last file; then make the folder `OUT`.

        Args:
            record: Its text.
        """
        write_text(self.folder / RECORD, record)
        self.publish()

    def publish(self) -> None:
        """Make a complete folder `OUT`."""
        with write_errors(self.out):
            disk.remove(self.folder / _LEDGER)
            disk.sync(self.folder)
            disk.rename(self.folder, self.out)
            disk.sync(self.out.parent)

    def discard(self) -> None:
        """Remove the folder: what is in it is of no use to anyone.

        The ledger goes last, so that a run that dies here is known for what it was.
        """
        with write_errors(self.folder):
            files = [path for path in self.folder.iterdir() if path.name != _LEDGER]
            for path in (*files, self.folder / _LEDGER):
                disk.remove(path)
            disk.remove_folder(self.folder)

    def _append(self, line: dict[str, Any]) -> None:
        path = self.folder / _LEDGER
        with write_errors(path):
            disk.append(path, (json.dumps(line) + "\n").encode())
            disk.sync(path)

    def _resume(self) -> None:
        """Take over what an earlier run with the same identity has done."""
        identity, self.decisions, shards = _read_ledger(self.folder / _LEDGER)
        if identity is None:
            self._check_unused()
            self._append({"identity": self.identity})
            with write_errors(self.folder):
                disk.sync(self.folder)
            return
        check_identity(self.folder, identity, self.identity)
        self._sweep()
        own = {path.name: path for path in self.folder.iterdir() if path.is_file()}
        for shard in shards:
            if shard.file in own and _is_whole(own[shard.file], shard.sha256):
                self.committed[shard.file] = shard

    def _sweep(self) -> None:
        """Remove what a run that was killed had not yet given its name."""
        with write_errors(self.folder):
            for path in self.folder.glob(".*"):
                disk.remove(path)

    def _check_unused(self) -> None:
        others = [p.name for p in self.folder.iterdir() if p.name != _LEDGER]
        if others and not self.is_complete:
            raise foreign_folder(self.folder, f"{others[0]} is in it")


@contextmanager
def open_workspace(out: Path, identity: dict[str, Any]) -> Iterator[Workspace]:
    """Lock `OUT.partial`, made if it is not there, and take over what is in it.

    Args:
        out: Where the result will be; must not exist, or be an empty folder.
        identity: What tells this run from others; compared with what is found.

    Raises:
        OutputError: `OUT` exists; another run holds the lock; the folder holds another
            run's work; or it cannot be written.
    """
    check_free(out)
    workspace = Workspace(out, identity)
    with write_errors(workspace.folder):
        make_folders(workspace.folder)
    with _locked(workspace.folder):
        check_free(out)  # another run may have finished in between
        if workspace.is_complete:
            check_identity(
                workspace.folder, recorded_identity(workspace.folder), identity
            )
        else:
            workspace._resume()
        yield workspace


def side_files(source: Path) -> list[Path]:
    """Return the files beside the weights that belong to the model.

    Links that lead elsewhere are not followed: a hostile checkpoint could carry a
    private file into what its user publishes.
    """
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and is_inside(source, path)
        and not path.name.endswith(".index.json")
        and not path.name.startswith(".")
        and path.name != RECORD
        and (path.suffix in _SIDE_SUFFIXES or path.name.startswith(_SIDE_NAMES))
    ]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with write_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with write_errors(folder):
            locked = _try_lock(folder, descriptor)
        if not locked:
            raise OutputError(
                f"Another run is at work in {folder}.",
                "Wait for it to end, or choose another output folder.",
            )
        yield
    finally:
        os.close(descriptor)


def _try_lock(folder: Path, descriptor: int) -> bool:
    """Lock a folder; False where another has it, or has just given it another name."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _is_whole(path: Path, digest: str) -> bool:
    """Whether a shard is what the ledger says; if it cannot be read, it is not."""
    try:
        return path.is_file() and sha256(path) == digest
    except OSError:
        return False


@contextmanager
def _read_back(path: Path) -> Iterator[None]:
    """Tell a file that Halve has written from one that its user must replace."""
    try:
        yield
    except CheckpointError as error:
        raise OutputError(
            f"{path} was written and cannot be read again: {error.problem}",
            "Check the disk and run the same command again; it goes on where it "
            "stopped.",
        ) from error


def _read_ledger(
    path: Path,
) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]], list[Committed]]:
    """Return identity, decisions and shards; cut off a line that a crash left."""
    if not path.is_file():
        return None, {}, []
    try:
        whole = read_bytes(path).rpartition(b"\n")[0]
        lines = [parse_json(line.decode("utf-8")) for line in whole.splitlines()]
        identity = dict(lines[0]["identity"]) if lines else None
        decisions = [line for line in lines[1:] if "settled" in line]
        decisions = {line["settled"]: dict(line["decision"]) for line in decisions}
        files = [line for line in lines[1:] if "settled" not in line]
        shards = [from_dict(Committed, line) for line in files]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise foreign_folder(path.parent, f"its {path.name} cannot be read") from error
    with write_errors(path):
        disk.cut(path, len(whole) + 1 if whole else 0)
    return identity, decisions, shards


def _index(folder: Path, files: Iterable[str]) -> str:
    """Return the index of shards, told from their headers."""
    infos = Checkpoint.of_files(folder / file for file in files).stored
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in infos)},
        "weight_map": {info.name: info.shard for info in infos},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _set_quantization(config: Path, entry: dict[str, Any] | None) -> None:
    """Let a config say how the weights beside it are packed, or that they are not."""
    with read_errors(config):
        entries = parse_json(config.read_text("utf-8"))
    if entries.get(_QUANTIZATION) == entry:
        return
    entries.pop(_QUANTIZATION, None)
    entries |= {_QUANTIZATION: entry} if entry else {}
    write_text(config, json.dumps(entries, indent=2, sort_keys=True) + "\n")
