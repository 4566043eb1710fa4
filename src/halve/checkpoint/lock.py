"""The lock on a workspace: one run at a time writes to a folder.

`flock` on the folder itself needs no lock file, and the system releases it when the
process ends, however it ends.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halve.checkpoint.files import write_errors
from halve.errors import OutputError


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on an existing folder.

    Raises:
        OutputError: Another process holds it, or the folder cannot be opened.
    """
    with write_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with write_errors(folder):
            is_locked = _try_lock(folder, descriptor)
        if not is_locked:
            raise OutputError(
                f"Another run is writing to {folder}.",
                "Wait for it to end, or choose another output folder.",
            )
        yield
    finally:
        os.close(descriptor)


def _try_lock(folder: Path, descriptor: int) -> bool:
    """Lock an open folder without waiting, and return whether that succeeded.

    A run that ends renames its folder while it still holds the lock. If that happens
    between our opening the folder and our locking it, the descriptor is locked but
    belongs to another name, or to none; `samestat` detects that.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
