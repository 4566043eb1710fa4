"""Read untrusted files: only inside their folder, and within bounds.

A model that a user downloads may be hostile. What these functions refuse raises
ValueError; the caller turns it into an error that says what the file is.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of a config, index or record. A config takes less than a megabyte; the index of the
# largest models, ten.
_MAX_BYTES = 2**26
# Of one JSON text. Parsed, `[[],[],...` takes twenty times as much memory as its text.
_MAX_VALUES = 2**20
# Characters of a name, in headers and in messages.
MAX_NAME = 500


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a file belongs to a checkpoint's folder once its links are resolved."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # circular links
        return False
    return any(target.is_relative_to(root) for root in _roots(folder))


def _roots(folder: Path) -> Iterator[Path]:
    """Yield the folders that may hold the files of a checkpoint.

    The cache of the Hugging Face Hub links `snapshots/REVISION/FILE` to `blobs/HASH`.
    """
    root = folder.resolve()
    yield root
    if root.parent.name == "snapshots":
        yield root.parent.parent / "blobs"


def read_bytes(path: Path, folder: Path | None = None) -> bytes:
    """Read a file of at most 64 MiB.

    Args:
        path: The file.
        folder: If given, the file must lie in this folder once its links are resolved.

    Raises:
        ValueError: It lies outside the folder, or is too large.
        OSError: It cannot be read, or is not a regular file.
    """
    if folder is not None and not is_inside(folder, path):
        raise ValueError("it is a link out of the folder")
    if not path.is_file():  # reading a named pipe would block
        raise FileNotFoundError(f"{path.name} is not a regular file")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"it has {size} bytes; the limit is {_MAX_BYTES}")
    return path.read_bytes()


def read_json(path: Path, folder: Path | None = None) -> Any:  # noqa: ANN401
    """Read a JSON file, within the bounds of `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, folder).decode("utf-8"))


def parse_json(text: str) -> Any:  # noqa: ANN401
    """Parse a JSON text of at most about a million values.

    Raises:
        ValueError: It is not JSON, or has too many values.
        RecursionError: It is nested too deeply.
    """
    if sum(map(text.count, "[{,")) > _MAX_VALUES:
        raise ValueError(f"it has more than {_MAX_VALUES} values")
    return json.loads(text)


def truncated(text: object, length: int = 200) -> str:
    """Return a text for a message, cut at `length` characters.

    A hostile file may hold names of any length.
    """
    full = str(text)
    return full if len(full) <= length else f"{full[:length]}..."
