"""Read data sets: from the Hub, or from a folder in one of the forms of `datasets`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from halve.calibration.documents import Render, read_documents
from halve.errors import CalibrationError, SourceError
from halve.text_name import DataSetName
from halve.untrusted import truncated

# Documents to read of a data set of unknown size: enough to draw windows from.
_MAX_DOCUMENTS = 20_000
# What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave in a folder.
_SAVED = ("state.json", "dataset_dict.json")
# The split of a saved `Dataset`, which has no name of its own.
_ONLY = "train"


def read_data_set(
    name: DataSetName, default_split: str, render: Render | None
) -> tuple[str, ...]:
    """Return the documents of a data set, up to 20 000 of them.

    Args:
        name: What to read.
        default_split: The split where none is named.
        render: Renders conversations.

    Raises:
        SourceError: The data set cannot be loaded, or has no such split.
        CalibrationError: It has no such column, or rows without text.
    """
    rows = _split(name, name.split or default_split)
    places = (
        (f"row {number} of {name.place}", row) for number, row in enumerate(rows, 1)
    )
    return tuple(read_documents(places, name.column or None, render))


def _split(name: DataSetName, split: str) -> Iterator[Mapping[str, Any]]:
    """Yield the first rows of a split."""
    with _loading(name):
        splits = _open(name)
    if split not in splits:
        raise SourceError(
            f"The data set {name.place} has no split {truncated(split)}, but "
            f"{truncated(', '.join(splits))}.",
            "Name one of them: DATA:CONFIG:SPLIT (CONFIG may be empty).",
        )
    rows = iter(islice(splits[split], _MAX_DOCUMENTS))
    while True:
        with _loading(name):
            row = next(rows, None)
        if row is None:
            return
        yield row


def _open(name: DataSetName) -> Mapping[Any, Any]:
    """Return split -> rows, streamed where they are not on this disk."""
    from datasets import (  # noqa: PLC0415  (slow to import)
        Dataset,
        load_dataset,
        load_from_disk,
    )

    folder = Path(name.place).expanduser()
    if any((folder / file).is_file() for file in _SAVED):
        saved = load_from_disk(str(folder))
        return {_ONLY: saved} if isinstance(saved, Dataset) else saved
    place = str(folder) if folder.is_dir() else name.place
    return load_dataset(place, name.config or None, streaming=True)


@contextmanager
def _loading(name: DataSetName) -> Iterator[None]:
    """Turn whatever `datasets` and its network layer raise into a SourceError."""
    try:
        yield
    except Exception as error:
        raise loading_error(name, error) from error


def loading_error(name: DataSetName, error: Exception) -> SourceError:
    """Return the error for a data set that could not be loaded."""
    reason = " ".join(str(error).split())[:300].rstrip(". ")
    what = f"{type(error).__name__}: {reason}"
    if "onfig name is missing" in reason or "BuilderConfig" in reason:
        return SourceError(
            f"The data set {name.place} needs a configuration ({what}).",
            "Name one of its configurations: DATA:CONFIG.",
        )
    if Path(name.place).expanduser().is_dir():
        return SourceError(
            f"The folder {name.place} cannot be read as a data set ({what}).",
            "Pass a folder with .jsonl, .parquet or .txt files, or one of them.",
        )
    return SourceError(
        f"The data set {name.place} could not be loaded ({what}).",
        "Check the name and the network, or pass a local .txt, .jsonl or .parquet "
        "file, or `stdlib`.",
    )


def column_of_file(name: DataSetName) -> str:
    """Return the column that is named for a file: `FILE:COLUMN` or `FILE:::COLUMN`.

    Returns:
        The column; empty where none is named.

    Raises:
        CalibrationError: A configuration or split is named.
    """
    given = [part for part in (name.config, name.split, name.column) if part]
    if len(given) > 1:
        raise CalibrationError(
            f"{name.place} is a file, which has neither configurations nor splits.",
            "Name its column alone: FILE:COLUMN.",
        )
    return given[0] if given else ""
