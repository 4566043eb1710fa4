"""Write files that are either complete or absent, and turn system errors into ours.

A file is written under a temporary name, forced to the disk, and renamed.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from halve.checkpoint import disk
from halve.checkpoint.safetensors_file import merge_files
from halve.errors import CheckpointError, OutputError
from halve.records.stored import sha256


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn a system error while writing `path` into an OutputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        is_full = code in {errno.ENOSPC, errno.EDQUOT} or "No space left" in str(error)
        reason = "the disk is full" if is_full else str(error)
        remedy = "Free some space" if is_full else "Fix the cause"
        raise OutputError(
            f"{path} could not be written: {reason}.",
            f"{remedy} and run the same command again to resume.",
        ) from error


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn a system error while reading `path` into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be read: {error}.",
            "Check the disk, restore the file, and run the same command again to "
            "resume.",
        ) from error


@contextmanager
def read_back_errors(path: Path) -> Iterator[None]:
    """Turn a CheckpointError about a file of the output into an OutputError.

    A CheckpointError asks the user to replace the file, but only Halve can write this
    one again.
    """
    try:
        yield
    except CheckpointError as error:
        raise OutputError(
            f"{path} was written but cannot be read back: {error.problem}",
            "Check the disk and run the same command again to resume.",
        ) from error


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name beside `path`, then rename it to `path`.

    Args:
        path: The file to create or replace.
        write: Writes the contents to the path that it receives.

    Raises:
        OutputError: Writing failed and `path` is unchanged; or the rename succeeded,
            but the disk reports that it may not be permanent.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with write_errors(path):
        try:
            write(temporary)
            disk.sync(temporary)
            disk.rename(temporary, path)
            disk.sync(path.parent)
        except BaseException:
            with suppress(OSError):  # the next run removes what is left
                disk.remove(temporary)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    replace_file(path, lambda temporary: disk.write(temporary, text.encode()))


def write_shard(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file, completely or not at all, and return its SHA-256."""
    contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace_file(path, lambda temporary: disk.save(temporary, contents))
    with write_errors(path):
        return sha256(path)


def merge_shards(path: Path, shards: Sequence[Path]) -> str:
    """Write a safetensors file with all tensors of several; return its SHA-256.

    Raises:
        OutputError: It cannot be written, or a shard not be read back.
    """
    with read_back_errors(path):
        replace_file(path, lambda new: disk.write_pieces(new, merge_files(shards)))
    with write_errors(path):
        return sha256(path)


def copy_file(source: Path, path: Path) -> None:
    """Copy the contents of a file, without its permissions, completely or not at all.

    Raises:
        CheckpointError: The source cannot be read.
        OutputError: The copy cannot be written.
    """
    with read_errors(source):
        data = source.read_bytes()
    replace_file(path, lambda temporary: disk.write(temporary, data))


def make_folders(path: Path) -> None:
    """Create a folder and its missing parents, each synced to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    for folder in reversed(missing):
        disk.make_folder(folder)
        disk.sync(folder.parent)
