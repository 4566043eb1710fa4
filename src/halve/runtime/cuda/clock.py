"""Timing work on a GPU by the GPU's own clock."""

from collections.abc import Callable

import torch


def gpu_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds from the beginning to the end of a piece of work on a GPU.

    The host runs ahead of the GPU, so its clock would measure how fast work is
    submitted. Waits for all earlier work first.

    Args:
        work: Submits the work, to the current stream of the device.
        device: The GPU.
    """
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000  # given in milliseconds
