"""How much memory a GPU has, and how much of it is left."""

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
