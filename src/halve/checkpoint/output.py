"""Whether a place can be used for an output, and whether it holds it already."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from halve.errors import OutputError, RecordError
from halve.records.codec import from_dict
from halve.records.version import check_format, parse_fields
from halve.untrusted import read_bytes, read_json, truncated

RECORD = "halve.json"

Record = TypeVar("Record")


def output_path(out: str | Path, source: Path) -> Path:
    """Return the path of an output folder.

    Raises:
        OutputError: It is no name for a folder, or the model itself.
    """
    try:
        path = Path(out).expanduser()
        path.exists()
        partial_of(path).exists()  # a longer name
    except (OSError, RuntimeError) as error:  # too long a name, or an unknown ~user
        raise OutputError(
            f"{str(out)[:200]!r} is no name for a folder.",
            "Choose another output folder.",
        ) from error
    if path.resolve() == source.resolve():
        raise OutputError(
            f"The output folder {out} is the model itself.",
            "Choose another output folder.",
        )
    return path


def is_finished(out: Path, identity: dict[str, Any]) -> bool:
    """Whether a folder was made by the very run of an identity.

    Raises:
        OutputError: It was made by another, or holds something else.
    """
    if not (out / RECORD).is_file():
        check_free(out)
        return False
    check_identity(out, recorded_identity(out), identity)
    return True


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
        raise foreign_folder(folder, f"its {RECORD} cannot be read") from error


@contextmanager
def name_record(folder: Path) -> Iterator[None]:
    """Name the file in a RecordError that is raised while it is read."""
    try:
        yield
    except RecordError as error:
        problem = f"{folder / RECORD} cannot be read: {error.problem}"
        raise RecordError(problem, error.remedy) from error


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
    """Return a record that an earlier run noted in a folder's ledger.

    Raises:
        OutputError: The note is none of that kind.
    """
    try:
        return from_dict(kind, note)
    except ValueError as error:
        raise foreign_folder(folder, "its ledger cannot be read") from error


def foreign_folder(folder: Path, reason: str) -> OutputError:
    """Return the error for a folder that something else made."""
    return OutputError(
        f"{folder} exists, and it is not the work of Halve ({reason}).",
        "Remove it or choose another output folder.",
    )


def partial_of(out: Path) -> Path:
    """Return the folder that becomes `out`."""
    return out.parent / f"{out.name}.partial"


def check_free(out: Path) -> None:
    """Raise OutputError where `out` is taken."""
    empty = out.is_dir() and not any(out.iterdir())
    if out.is_symlink() or (out.exists() and not empty):
        raise OutputError(
            f"{out} exists already.", "Remove it or choose another output folder."
        )


def check_space(out: Path, wanted: int) -> None:
    """Raise OutputError where the disk has too little room, before work begins.

    What an earlier run of the same name has written already counts as room.
    """
    partial = partial_of(out)
    done = partial.glob("*.safetensors") if partial.is_dir() else ()
    wanted -= sum(path.stat().st_size for path in done)
    place = next(p for p in (out, *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise OutputError(
            f"{place} has {free / 2**30:.2f} GiB free, but {wanted / 2**30:.2f} GiB "
            "are needed.",
            "Free some space or choose another disk.",
        )


def check_identity(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise OutputError, naming the differences, where two runs are not the same."""
    different = [
        f"{truncated(key)}: {truncated(found.get(key))} there, {wanted.get(key)} here"
        for key in dict.fromkeys([*found, *wanted])
        if found.get(key) != wanted.get(key)
    ]
    if different:
        raise OutputError(
            f"{folder} was begun with other arguments "
            f"({truncated('; '.join(different), 600)}).",
            "Run with those arguments to go on, remove the folder, or choose another.",
        )
