"""Files from strangers: confined to their folder, and read within bounds.

What cannot be read raises ValueError; who reads turns that into a sentence of its own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A megabyte holds any config, and ten the index of the largest models.
_MAX_BYTES = 2**26
# Values in one JSON text. `[[],[],...` takes twenty times its own size when parsed.
_MAX_VALUES = 2**20
# Of a name in messages and in headers.
MAX_NAME = 500


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a file, its links followed, belongs to a checkpoint's folder."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # links that lead in a circle
        return False
    return any(target.is_relative_to(home) for home in _homes(folder))


def _homes(folder: Path) -> Iterator[Path]:
    """Yield the folders whose files belong to a checkpoint.

    The hub's cache links `snapshots/REVISION/FILE` to `blobs/HASH`.
    """
    home = folder.resolve()
    yield home
    if home.parent.name == "snapshots":
        yield home.parent.parent / "blobs"


def read_bytes(path: Path, folder: Path | None = None) -> bytes:
    """Return what a file holds, if it is no larger than any of its kind.

    Args:
        path: Of the file.
        folder: It must lie in this one, links followed, where one is given.

    Raises:
        ValueError: It leads out of the folder, or is too large.
        OSError: It is not there.
    """
    if folder is not None and not is_inside(folder, path):
        raise ValueError("it is a link out of the folder")
    if not path.is_file():  # reading a pipe would wait for ever
        raise FileNotFoundError(f"{path.name} is no file")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"{size} bytes are more than any such file has")
    return path.read_bytes()


def read_json(path: Path, folder: Path | None = None) -> Any:  # noqa: ANN401
    """Return what a JSON file holds, as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, folder).decode("utf-8"))


def parse_json(text: str) -> Any:  # noqa: ANN401
    """Return what a JSON text holds.

    Raises:
        ValueError: It is not JSON, or holds too many values.
        RecursionError: It is nested too deep.
    """
    if sum(map(text.count, "[{,")) > _MAX_VALUES:
        raise ValueError(f"it holds more than {_MAX_VALUES} values")
    return json.loads(text)


def truncated(text: object, length: int = 200) -> str:
    """Return a text for a message, cut where a stranger made it endless."""
    words = str(text)
    return words if len(words) <= length else f"{words[:length]}..."
