"""The primitive operations that change the disk under an output.

Nothing else in Halve writes there. Each is one operation that a disk can refuse, or
that a power failure can precede or follow, so that tests can make each one fail. The
callers decide on their order, and on what happens when one fails.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from halve.system import IS_WINDOWS


def make_folder(path: Path) -> None:
    """Create a folder whose parent exists; an existing one is left as it is."""
    path.mkdir(exist_ok=True)


def write(path: Path, data: bytes) -> None:
    """Create or overwrite a file."""
    path.write_bytes(data)


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Create or overwrite a file, piece by piece."""
    with path.open("wb") as file:
        file.writelines(pieces)


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Create or overwrite a safetensors file."""
    save_file(tensors, path, {"format": "pt"})
    path.chmod(0o666 & ~_umask())  # the library creates files with mode 0600


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def append(path: Path, data: bytes) -> None:
    """Append to a file, which is created if it does not exist."""
    with path.open("ab") as file:
        file.write(data)


def truncate(path: Path, size: int) -> None:
    """Shorten a file to `size` bytes."""
    os.truncate(path, size)


def sync(path: Path) -> None:
    """Force the contents of a file or folder to the disk.

    Windows syncs files that are open for writing, and cannot sync folders: there a
    power failure may undo a rename.
    """
    if IS_WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if IS_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder, atomically; a file or an empty folder is replaced.

    Windows replaces files alone, so that there an empty folder is removed first.
    """
    if IS_WINDOWS and target.is_dir():
        target.rmdir()
    source.replace(target)


def remove(path: Path) -> None:
    """Remove a file, if it exists."""
    path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove an empty folder."""
    path.rmdir()
