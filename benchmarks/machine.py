"""Describes the machine and the versions, which every benchmark prints first."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch


def describe_machine() -> str:
    """Return three lines: the processor and its memory, the commit, the versions."""
    return "\n".join(
        [
            f"machine: {_processor()}, {os.cpu_count()} cores, "
            f"{torch.get_num_threads()} threads, {_memory():.0f} GiB",
            f"commit: {_commit()}",
            f"versions: Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {metadata.version('transformers')}",
        ]
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    here = Path(__file__).parent
    try:
        return subprocess.run(
            command, cwd=here, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
