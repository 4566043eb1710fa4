"""Return freed memory to the operating system, and to a GPU."""

import ctypes
import sys

import torch


def malloc_trim() -> None:
    """Return the memory that the C library caches after it was freed to the system.

    glibc caches freed blocks of up to 32 MiB for reuse, and activations and matrices
    are of such sizes: without this, peak memory is the sum of all phases instead of the
    largest (docs/log.md). Does nothing with another C library.

    The same holds for a GPU's memory, of which torch caches freed blocks: their sizes
    differ from phase to phase, and a Gram matrix does not fit between them.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
