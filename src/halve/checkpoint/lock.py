"""The lock on a workspace: one run at a time writes to a folder.

`flock` on the folder itself needs no lock file, and the system releases it when the
process ends, however it ends. Windows has no `flock` and opens no folders: there
filelock locks a file beside the folder, which the system releases as well.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halve.checkpoint.files import write_errors
from halve.checkpoint.work_folder import LOCK_SUFFIX
from halve.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on an existing folder.

    Raises:
        OutputError: Another process holds it, or the folder cannot be opened.
    """
    with _locked_file(folder) if fcntl is None else _locked_folder(folder):
        yield


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    with write_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with write_errors(folder):
            is_locked = _try_flock(folder, descriptor)
        if not is_locked:
            raise _is_locked(folder)
        yield
    finally:
        os.close(descriptor)


def _try_flock(folder: Path, descriptor: int) -> bool:
    """Lock an open folder without waiting, and return whether that succeeded.

    A run that ends renames its folder while it still holds the lock. If that happens
    between our opening the folder and our locking it, the descriptor is locked but
    belongs to another name, or to none; `samestat` detects that.
    """
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


@contextmanager
def _locked_file(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout  # noqa: PLC0415 (not needed elsewhere)

    # Beside the folder, since Windows renames no folder that holds an open file.
    lock = FileLock(folder.with_name(f"{folder.name}{LOCK_SUFFIX}"))
    with write_errors(folder):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise _is_locked(folder) from error
    try:
        if not folder.is_dir():  # the run that held the lock may have renamed it
            raise _is_locked(folder)
        yield
    finally:
        lock.release()


def _is_locked(folder: Path) -> OutputError:
    return OutputError(
        f"Another run is writing to {folder}.",
        "Wait for it to end, or choose another output folder.",
    )
