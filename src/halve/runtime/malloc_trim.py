"""Memory that was freed, handed back to the system."""

import ctypes
import sys


def malloc_trim() -> None:
    """Hand back what the C library keeps of freed memory.

    glibc keeps what is freed in pieces of up to 32 MiB for later, and activations and
    matrices are of such sizes: without this the peak is the sum of all phases, and not
    the largest (docs/log.md). Does nothing where the C library is another one.
    """
    if sys.platform != "linux":
        return
    trimmer = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trimmer is not None:
        trimmer(0)
