"""Return freed memory to the operating system."""

import ctypes
import sys


def malloc_trim() -> None:
    """Return the memory that the C library caches after it was freed to the system.

    glibc caches freed blocks of up to 32 MiB for reuse, and activations and matrices
    are of such sizes: without this, peak memory is the sum of all phases instead of the
    largest (docs/log.md). Does nothing with another C library.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
