"""Triton, which compiles the kernels for NVIDIA GPUs where it is installed.

CUDA builds of torch bring it along on Linux. Modules that define kernels import it at
their top, so they are imported only where `has_triton` says that they can be.
"""

from functools import cache
from importlib.util import find_spec

import torch


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def has_triton(device: torch.device) -> bool:
    """Whether Halve's Triton kernels can run on tensors of this device."""
    return device.type == "cuda" and _installed()
