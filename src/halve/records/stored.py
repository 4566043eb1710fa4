"""Read what Halve wrote beside a model: its record and its measurements.

Every byte of these files is covered by a checksum, which is compared before a value is
used. No torch here.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from halve.errors import CheckpointError, RecordError
from halve.records.checksum import has_valid_checksum
from halve.records.measurement import Measurement, parse_measurements
from halve.records.parse import OutputRecord, parse_record
from halve.records.version import parse_fields
from halve.untrusted import read_bytes

# The file name of the record; a folder that holds it is complete.
RECORD = "halve.json"
# Measurements of a folder with such a record; those of another output are not its own.
MEASUREMENTS = "measurements.json"

REMEDY = "Make the output again, or restore the file from an intact copy."
_MEASURE_AGAIN = "Remove the file, and measure again with --keep."
# Whatever JSON of other contents makes a parser raise.
PARSE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


def read_output_record(folder: Path) -> OutputRecord:
    """Read the `halve.json` of an output.

    Raises:
        RecordError: The record has another format.
        CheckpointError: There is none, or it is damaged.
    """
    path = folder / RECORD
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"There is no {RECORD} in {folder}, which would list what was written.",
            "Pass a folder that Halve has written.",
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", REMEDY) from error
    # Before the checksum: a record of another format may have none, or another.
    with name_record(folder):
        return _parse(path, data)


def _parse(path: Path, data: bytes) -> OutputRecord:
    """Return a record, checked for its format, its checksum, and its contents."""
    try:
        parse_fields(data.decode())
        _check_checksum(path, data)
        record = parse_record(data.decode())
        _check_paths(record)
    except PARSE_ERRORS as error:
        _check_checksum(path, data)
        raise CheckpointError(f"{path} cannot be read ({error!r}).", REMEDY) from error
    return record


def _check_checksum(path: Path, data: bytes) -> None:
    if not has_valid_checksum(data):
        raise CheckpointError(
            f"{path} is damaged: it does not match its own checksum.", REMEDY
        )


def _check_paths(record: OutputRecord) -> None:
    """Raise ValueError if a recorded file would lie outside of the folder."""
    if any(Path(name).name != name for name in record.shards):
        raise ValueError("a path in the place of a file name")
    paths = [PurePosixPath(name) for name in record.files]
    if any(path.is_absolute() or ".." in path.parts for path in paths):
        raise ValueError("a path out of the folder")


@contextmanager
def name_record(folder: Path) -> Iterator[None]:
    """Name the file in a RecordError that is raised while it is read."""
    try:
        yield
    except RecordError as error:
        problem = f"{folder / RECORD}: {error.problem}"
        raise RecordError(problem, error.remedy) from error


def file_damage(path: Path, digest: str) -> str | None:
    """Return what is wrong with the bytes of a file; None where nothing is."""
    if not path.is_file():
        return "it is missing"
    try:
        actual = sha256(path)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None if actual == digest else "its SHA-256 is not the recorded one"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_measurements(folder: Path) -> tuple[Measurement, ...]:
    """Return the measurements of an output; none if none were kept.

    Raises:
        CheckpointError: The file is damaged, or its measurements are of an output that
            was in the folder before.
    """
    path = folder / MEASUREMENTS
    if not path.exists():
        return ()
    try:
        data = read_bytes(path, folder)
        if not has_valid_checksum(data):
            raise ValueError("it does not match its own checksum")
        measurements = parse_measurements(data.decode())
    except (OSError, *PARSE_ERRORS) as error:
        raise CheckpointError(
            f"{path} cannot be read ({str(error)[:200]}).", _MEASURE_AGAIN
        ) from error
    digest = sha256(folder / RECORD)
    if any(measurement.of != digest for measurement in measurements):
        raise CheckpointError(
            f"{path} holds measurements of another output than the one in {folder}.",
            _MEASURE_AGAIN,
        )
    return measurements
