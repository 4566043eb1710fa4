"""How much memory there is, and how much of it is left, on a GPU and on the host."""

import os
from pathlib import Path

import torch


def gpu_nbytes(device: torch.device) -> int:
    """Return the bytes of memory that a GPU has."""
    return torch.cuda.get_device_properties(device).total_memory


def free_gpu_nbytes(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that no tensor takes, of any process.

    Memory that torch caches for its next tensors counts as free.
    """
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached


def free_host_nbytes() -> int:
    """Return the bytes of memory that the host can give without swapping."""
    path = Path("/proc/meminfo")
    if path.is_file():
        for line in path.read_text("ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 2**10  # given in KiB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
