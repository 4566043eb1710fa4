"""What this machine is, for records."""

import os
import platform
from pathlib import Path

import torch

from halve.records import MachineRecord


def this_machine(device: torch.device) -> MachineRecord:
    """Return what computes: the processor, its memory, and a device."""
    name = str(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = os.cpu_count() or 1
    return MachineRecord(cpu_name(), cores, memory, name, torch.get_num_threads())


def cpu_name() -> str:
    """Return the name of the CPU, or its architecture if the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
