"""Storage for hidden states: in memory, or past a limit in a memory-mapped file.

Weights of experts that memory has no room for are spilled in the same way.
"""

import errno
import mmap
import os
import shutil
import tempfile
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from halve.errors import OutputError
from halve.system import total_memory


def default_activation_memory() -> int:
    """Return the default limit in bytes: a quarter of the machine's memory."""
    return total_memory() // 4


def allocate_hidden(
    shape: tuple[int, ...], budget: int, folder: Path | None = None
) -> Tensor:
    """Allocate an uninitialised float32 tensor for hidden states.

    Args:
        shape: [samples, length, width].
        budget: The number of bytes up to which the tensor is in memory. Larger ones are
            spilled to a memory-mapped file.
        folder: The folder of that file; the system's temporary folder by default. The
            file has no name, so it disappears with the process.

    Raises:
        OutputError: The disk has no space for the file.
    """
    size = 4 * prod(shape)
    if size <= budget:
        return torch.empty(shape)
    try:
        return _mapped(shape, torch.float32, folder)
    except OSError as error:
        raise OutputError(
            f"The hidden states need {size / 2**30:.1f} GiB in "
            f"{folder or tempfile.gettempdir()}, which could not be allocated "
            f"({error.strerror}).",
            "Free some space, use fewer samples, or raise --activation-memory.",
        ) from error


def spill_weight(weight: Tensor, folder: Path | None = None) -> Tensor:
    """Return a copy of a weight in a memory-mapped file.

    Args:
        weight: Of any shape and dtype, on the CPU.
        folder: As for `allocate_hidden`.

    Raises:
        OutputError: The disk has no space for the file.
    """
    try:
        return _mapped(tuple(weight.shape), weight.dtype, folder).copy_(weight)
    except OSError as error:
        raise OutputError(
            f"A weight of {weight.nbytes / 2**20:.0f} MiB could not be spilled to "
            f"{folder or tempfile.gettempdir()} ({error.strerror}).",
            "Free space for all experts of a block there, or raise --memory.",
        ) from error


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """Return an uninitialised tensor in a memory-mapped file without a name."""
    count = prod(shape)
    with tempfile.TemporaryFile(dir=folder, prefix="hidden-") as file:
        nbytes = max(count * dtype.itemsize, 1)
        _reserve(file.fileno(), nbytes, folder)
        name = Path(f"/proc/self/fd/{file.fileno()}")
        if name.exists():
            mapped = torch.from_file(str(name), shared=True, size=count, dtype=dtype)
        else:  # the same, but it holds a descriptor as long as the tensor lives
            mapped = torch.frombuffer(
                mmap.mmap(file.fileno(), nbytes), dtype=dtype, count=count
            )
        return mapped.view(shape)


def _reserve(descriptor: int, nbytes: int, folder: Path | None) -> None:
    """Extend an empty file, and reserve its space on the disk where the system can.

    Writing to a mapped file on a full disk kills the process.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
        return
    if shutil.disk_usage(folder or tempfile.gettempdir()).free < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.truncate(descriptor, nbytes)
