"""Storage for hidden states: in memory, or past a limit in a memory-mapped file."""

import os
import tempfile
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from halve.errors import OutputError


def default_activation_memory() -> int:
    """Return the default limit in bytes: a quarter of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


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
        with tempfile.TemporaryFile(dir=folder, prefix="hidden-") as file:
            # Reserved now: writing to a mapped file on a full disk kills the process.
            os.posix_fallocate(file.fileno(), 0, size)
            name = f"/proc/self/fd/{file.fileno()}"
            return torch.from_file(name, shared=True, size=prod(shape)).view(shape)
    except OSError as error:
        raise OutputError(
            f"The hidden states need {size / 2**30:.1f} GiB in "
            f"{folder or tempfile.gettempdir()}, which could not be allocated "
            f"({error.strerror}).",
            "Free some space, use fewer samples, or raise --activation-memory.",
        ) from error
