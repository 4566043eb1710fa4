r"""The ledger: an append-only log of what a run has completed.

One JSON object per line. The first holds the run's identity; each further one a
committed shard, or a decision that the blocks depend on:

    {"identity": {...}}
    {"decision": "allocation", "value": {...}}
    {"file": "model-00001-of-00003.safetensors", "sha256": "...", "note": {...}}

A line counts if it ends in a newline. A crash may leave the last one without; reading
the ledger truncates it there, so that the next line does not continue it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halve.checkpoint import disk
from halve.checkpoint.files import write_errors
from halve.checkpoint.output import not_written_by_halve
from halve.records.codec import from_dict
from halve.untrusted import parse_json, read_bytes

LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class Committed:
    """A shard that is complete and on the disk.

    Attributes:
        file: File name.
        sha256: SHA-256 of the file, in hexadecimal.
        note: What the run recorded about its contents.
    """

    file: str
    sha256: str
    note: dict[str, Any]


@dataclass(frozen=True)
class Entries:
    """The contents of a ledger.

    Attributes:
        identity: Identity of the run; None where the ledger is absent or empty.
        decisions: Name -> value. A later decision replaces an earlier one of the same
            name.
        shards: Committed shards, in the order of their lines.
    """

    identity: dict[str, Any] | None = None
    decisions: dict[str, dict[str, Any]] = field(default_factory=dict)
    shards: tuple[Committed, ...] = ()


class Ledger:
    """The ledger of a workspace.

    Attributes:
        path: The file; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER

    def start(self, identity: dict[str, Any]) -> None:
        """Append the first line."""
        self._append({"identity": identity})

    def add_shard(self, shard: Committed) -> None:
        """Append a shard, which must be on the disk already."""
        self._append(vars(shard))

    def add_decision(self, name: str, value: dict[str, Any]) -> None:
        """Append a decision."""
        self._append({"decision": name, "value": value})

    def read(self) -> Entries:
        """Return the contents, and truncate a last line that a crash left incomplete.

        Raises:
            OutputError: The file cannot be read, is no ledger, or cannot be truncated.
        """
        if not self.path.is_file():
            return Entries()
        try:
            complete = _complete_lines(read_bytes(self.path))
            entries = _parse(complete)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"its {LEDGER} cannot be read"
            raise not_written_by_halve(self.path.parent, reason) from error
        with write_errors(self.path):
            disk.truncate(self.path, len(complete))
        return entries

    def _append(self, entry: dict[str, Any]) -> None:
        with write_errors(self.path):
            disk.append(self.path, (json.dumps(entry) + "\n").encode())
            disk.sync(self.path)


def _complete_lines(data: bytes) -> bytes:
    """Return the data up to and including the last newline."""
    return data[: data.rfind(b"\n") + 1]


def _parse(data: bytes) -> Entries:
    if not data:
        return Entries()
    first, *rest = [parse_json(line.decode("utf-8")) for line in data.splitlines()]
    decisions = [entry for entry in rest if "decision" in entry]
    shards = [entry for entry in rest if "decision" not in entry]
    return Entries(
        dict(first["identity"]),
        {entry["decision"]: dict(entry["value"]) for entry in decisions},
        tuple(from_dict(Committed, entry) for entry in shards),
    )
