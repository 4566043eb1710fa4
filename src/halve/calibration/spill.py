"""Hidden states between blocks: in memory, or past a budget in a mapped file."""

import os
import tempfile
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from halve.errors import OutputError


def default_budget() -> int:
    """Return a quarter of the machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def allocate_hidden(
    shape: tuple[int, int, int], budget: int, folder: Path | None = None
) -> Tensor:
    """Return room for hidden states, uninitialised, in float32.

    Args:
        shape: [samples, length, width].
        budget: Bytes up to which they live in memory.
        folder: Where a mapped file lies; the system's folder for temporary files by
            default. The file has no name: it is gone when the process is.

    Raises:
        OutputError: The disk has no room for the file.
    """
    size = 4 * prod(shape)
    if size <= budget:
        return torch.empty(shape)
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="hidden-") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            name = f"/proc/self/fd/{file.fileno()}"
            return torch.from_file(name, shared=True, size=prod(shape)).view(shape)
    except OSError as error:
        raise OutputError(
            f"The hidden states need {size / 2**30:.1f} GiB in "
            f"{folder or tempfile.gettempdir()}, which could not be had "
            f"({error.strerror}).",
            "Free some space, use fewer samples, or raise --activation-memory.",
        ) from error
