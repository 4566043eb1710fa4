"""Files that are whole or absent: written beside, forced to the disk, renamed."""

import errno
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from halve.checkpoint import disk
from halve.errors import CheckpointError, OutputError


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what the system says of a failed write into an OutputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        full = code in {errno.ENOSPC, errno.EDQUOT} or "No space left" in str(error)
        reason = "the disk is full" if full else str(error)
        remedy = "Free some space" if full else "Put that right"
        raise OutputError(
            f"{path} could not be written: {reason}.",
            f"{remedy} and run the same command again; it goes on where it stopped.",
        ) from error


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn what the system says of a failed read into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be read: {error}.",
            "Check the disk, put the file there again, and run the same command; it "
            "goes on where it stopped.",
        ) from error


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling, then make it `path` in one step.

    Raises:
        OutputError: The write failed; `path` is as it was. Or it has taken place and
            the disk does not vouch for it.
    """
    sibling = path.with_name(f".{path.name}.tmp")
    with write_errors(path):
        try:
            write(sibling)
            disk.sync(sibling)
            disk.rename(sibling, path)
            disk.sync(path.parent)
        except BaseException:
            with suppress(OSError):  # what stays is swept away by the next run
                disk.remove(sibling)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    replace_file(path, lambda sibling: disk.write(sibling, text.encode()))


def write_shard(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file, whole or not at all, and return its SHA-256."""
    contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace_file(path, lambda sibling: disk.save(sibling, contents))
    with write_errors(path):
        return sha256(path)


def copy_file(source: Path, path: Path) -> None:
    """Copy contents, not permissions, whole or not at all.

    Raises:
        CheckpointError: The source cannot be read.
        OutputError: The copy cannot be written.
    """
    with read_errors(source):
        data = source.read_bytes()
    replace_file(path, lambda sibling: disk.write(sibling, data))


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folders(path: Path) -> None:
    """Make a folder and its parents, so that they outlive a power failure."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    for folder in reversed(missing):
        disk.make_folder(folder)
        disk.sync(folder.parent)
