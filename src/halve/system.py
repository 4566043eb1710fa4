"""What the operating system tells of this machine and process, on any platform.

psutil answers most of it. What it does not tell is read here: the peak of memory, and
the name of the processor.
"""

import platform
import sys
from pathlib import Path

import psutil

IS_WINDOWS = sys.platform == "win32"


def total_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return psutil.virtual_memory().total


def available_memory() -> int:
    """Return the bytes of memory that this machine can give without swapping."""
    return psutil.virtual_memory().available


def resident_memory() -> int:
    """Return the bytes of this process that are in memory now."""
    return psutil.Process().memory_info().rss


def peak_memory() -> int:
    """Return the peak of this process's resident memory, in bytes.

    psutil has it on Windows only. On Linux it is read from /proc, since getrusage
    starts with the parent's size.
    """
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    return _peak_of_linux() or _peak_of_posix() or resident_memory()


def own_peak(before: int) -> int:
    """Return the peak of this process's memory; 0 if it is of before a run.

    A process that has loaded a model, such as a notebook's, may have held more then.

    Args:
        before: The peak when the run started.
    """
    peak = peak_memory()
    return peak if peak > before else 0


def _peak_of_linux() -> int:
    status = Path("/proc/self/status")
    lines = status.read_text("utf-8").splitlines() if status.is_file() else []
    peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else 0


def _peak_of_posix() -> int:
    try:
        import resource  # noqa: PLC0415 (there is none on Windows)
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """Return the name of the CPU, or its architecture if the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
