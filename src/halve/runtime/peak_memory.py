"""The peak of a process's memory so far."""

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Return the peak of this process's resident memory, in bytes.

    On Linux it is read from /proc, since getrusage starts with the parent's size.
    """
    status = Path("/proc/self/status")
    lines = status.read_text("utf-8").splitlines() if status.is_file() else []
    peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    if peaks:
        return int(peaks[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
