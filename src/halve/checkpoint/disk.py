"""Every step that changes the disk under an output; nowhere else is one.

Each is one thing that a disk can refuse, or that a power failure can cut off before or
after, so that tests can let each fail in its turn. What order they come in, and what is
lost where one fails, is decided by the callers.
"""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def make_folder(path: Path) -> None:
    """Make a folder whose parent is there."""
    path.mkdir(exist_ok=True)


def write(path: Path, data: bytes) -> None:
    """Write a file, in the place of what it held."""
    path.write_bytes(data)


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, in the place of what it held."""
    save_file(tensors, path, {"format": "pt"})
    path.chmod(0o666 & ~_umask())  # the library makes private files


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def append(path: Path, data: bytes) -> None:
    """Write at the end of a file, made if it is not there."""
    with path.open("ab") as file:
        file.write(data)


def cut(path: Path, size: int) -> None:
    """Leave the first bytes of a file alone."""
    os.truncate(path, size)


def sync(path: Path) -> None:
    """Force a file's, or a folder's, contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a file, or a folder, another name, in one step."""
    source.rename(target)


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove an empty folder."""
    path.rmdir()
