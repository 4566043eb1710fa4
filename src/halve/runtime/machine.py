"""What this machine is, for records."""

import os

import torch

from halve.records import MachineRecord
from halve.system import cpu_name, total_memory


def this_machine(device: torch.device) -> MachineRecord:
    """Return what computes: the processor, its memory, and a device."""
    name = str(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    cores = os.cpu_count() or 1
    threads = torch.get_num_threads()
    return MachineRecord(cpu_name(), cores, total_memory(), name, threads)
