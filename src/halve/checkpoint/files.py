"""Files that are whole or absent: written beside, forced to the disk, renamed."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from halve.errors import OutputError


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


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling, then make it `path` in one step.

    Raises:
        OutputError: The write failed; `path` is as it was.
    """
    sibling = path.with_name(f".{path.name}.tmp")
    with write_errors(path):
        try:
            write(sibling)
            sibling.chmod(0o666 & ~_umask())  # libraries make private files
            sync(sibling)
            sibling.replace(path)
            sync(path.parent)
        except BaseException:
            sibling.unlink(missing_ok=True)
            raise


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    replace_file(path, lambda sibling: _write_utf8(sibling, text))


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def write_shard(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file, whole or not at all, and return its SHA-256."""
    contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace_file(path, lambda sibling: save_file(contents, sibling, {"format": "pt"}))
    return sha256(path)


def copy_file(source: Path, path: Path) -> None:
    """Copy contents, not permissions, whole or not at all."""
    replace_file(path, lambda sibling: _copy(source, sibling))


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file's, or a folder's, contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
