"""Checks on an output path: is it free, is it finished, and by which run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from halve.checkpoint.work_folder import (
    foreign_names,
    is_being_filled,
    partial_path,
)
from halve.errors import OutputError
from halve.records.codec import from_dict
from halve.records.stored import MEASUREMENTS, RECORD, name_record
from halve.records.version import check_format, parse_fields
from halve.untrusted import read_bytes, read_json, truncated

# Files that Halve writes beside a model, and that are not copied with it.
OWN_FILES = frozenset({RECORD, MEASUREMENTS})

Record = TypeVar("Record")


def output_path(out: str | Path, source: Path) -> Path:
    """Return the path of an output folder, with `~`, `.` and links to folders resolved.

    Args:
        out: As the user wrote it.
        source: Folder of the source model.

    Raises:
        OutputError: It is not a valid path, or it is the source model itself.
    """
    try:
        path = Path(out).expanduser()
        if path.name in {"", ".."} or path.is_dir():
            path = path.resolve()  # to a path whose parent and name can be used
        path.exists()
        partial_path(path).exists()  # a longer name
        is_source = path.resolve() == source.resolve()
    # Name too long, unknown ~user, null byte, or no path at all.
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise OutputError(
            f"{str(out)[:200]!r} is not a valid folder name.",
            "Choose another output folder.",
        ) from error
    if is_source:
        raise OutputError(
            f"The output folder {out} is the model itself.",
            "Choose another output folder.",
        )
    return path


def is_finished(out: Path, identity: dict[str, Any]) -> bool:
    """Whether a folder is the complete output of a run with this identity.

    Returns:
        True if it is; False if the folder is free to be written.

    Raises:
        OutputError: It is the output of another run, or holds something else.
        RecordError: Its record has another format.
    """
    # Where files were being moved up into `out`, they may not all be there.
    if not (out / RECORD).is_file() or is_being_filled(out):
        check_available(out)
        return False
    check_identity(out, recorded_identity(out), identity)
    return True


def check_available(out: Path) -> None:
    """Raise OutputError unless `out` is absent or an empty folder.

    A folder counts as empty if all that it holds are files that a run has begun to move
    up into it.
    """
    foreign = foreign_names(out) if out.is_dir() else []
    if foreign and is_being_filled(out) and record_of_work(out):
        return
    if foreign or out.is_symlink() or (out.exists() and not out.is_dir()):
        inside = f", and contains {truncated(foreign[0])}" if foreign else ""
        raise OutputError(
            f"{out} already exists{inside}.",
            "Remove it or choose another output folder.",
        )


def record_of_work(out: Path) -> Path | None:
    """Return the record that a run has written but not published; None if none has.

    Where an output is filled in place, the record is the last file to be moved up.
    """
    partial = partial_path(out)
    folders = [partial, out] if is_being_filled(out) else [partial]
    paths = (folder / RECORD for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def check_space(out: Path, needed: int) -> None:
    """Raise OutputError if the disk has too little free space for the output.

    Args:
        out: The output folder; it need not exist.
        needed: Size of all shards in bytes. What an earlier run has already written to
            its work folder is subtracted.
    """
    partial = partial_path(out)  # which may be on another disk than `out`
    written = partial.glob("*.safetensors") if partial.is_dir() else ()
    needed -= sum(path.stat().st_size for path in written)
    place = next(p for p in (partial, *partial.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"{place} has {free / 2**30:.2f} GiB free, but {needed / 2**30:.2f} GiB "
            "are needed.",
            "Free some space or choose another disk.",
        )


def check_identity(
    folder: Path, actual: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Raise OutputError, naming the differences, if two identities differ.

    Args:
        folder: The output, or workspace, for the message.
        actual: Identity of the run that wrote it.
        expected: Identity of this run.
    """
    differences = [
        f"{truncated(key)}: {truncated(actual.get(key))} there, "
        f"{expected.get(key)} here"
        for key in dict.fromkeys([*actual, *expected])
        if actual.get(key) != expected.get(key)
    ]
    if differences:
        raise OutputError(
            f"{folder} was written with other arguments "
            f"({truncated('; '.join(differences), 600)}).",
            "Run with those arguments to resume, remove the folder, or choose another.",
        )


def not_written_by_halve(folder: Path, reason: str) -> OutputError:
    """Return the error for a folder whose contents are not those of a run."""
    return OutputError(
        f"{folder} exists and was not written by Halve ({reason}).",
        "Remove it or choose another output folder.",
    )


def read_record(folder: Path, parse: Callable[[str], Record]) -> Record:
    """Read the `halve.json` of a folder that a run has completed.

    Args:
        folder: The folder.
        parse: Parses the text of the file. Any error that malformed JSON, or JSON of
            other contents, makes it raise is turned into an OutputError.

    Raises:
        RecordError: The record has another format.
        OutputError: The file cannot be read, or is not a record of this kind.
    """
    try:
        with name_record(folder):
            return parse(read_bytes(folder / RECORD).decode("utf-8"))
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise not_written_by_halve(folder, f"its {RECORD} cannot be read") from error


def recorded_identity(folder: Path) -> dict[str, Any]:
    """Return the identity of the run that completed a folder."""
    return read_record(folder, lambda text: dict(parse_fields(text)["identity"]))


def source_record(source: Path) -> dict[str, Any] | None:
    """Return the members of the `halve.json` that lies beside a model, if any.

    A link out of the folder is not followed: it could make a private file part of the
    record that the user publishes.

    Returns:
        The members, checksum included; None where there is no such file, or it is not
        a record of Halve.

    Raises:
        RecordError: The record has another format.
    """
    try:
        with name_record(source):
            fields = dict(read_json(source / RECORD, source))
            check_format(fields)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return fields


def parse_note(folder: Path, kind: type[Record], note: object) -> Record:
    """Parse a note from the ledger of a workspace.

    Args:
        folder: The workspace, for the error.
        kind: The dataclass that the note was made from.
        note: As recorded with a shard.

    Raises:
        OutputError: The note does not have these fields.
    """
    try:
        return from_dict(kind, note)
    except ValueError as error:
        raise not_written_by_halve(folder, "its ledger cannot be read") from error
