"""Which device `--device auto` stands for."""

import warnings
from functools import cache

import torch

from halve.errors import HalveWarning

# Whether `auto` takes a GPU where there is one. False as long as no release has passed
# its checks on one: then a GPU is used only where the user names it. The help of
# `--device` (options/shared.py) says the same.
AUTO_TAKES_GPU = False


def auto_device() -> str:
    """Return the device that `auto` stands for on this machine: `cpu` or `cuda`.

    Warns:
        HalveWarning: Once in a process, where there is a GPU and the CPU is taken.
    """
    if not torch.cuda.is_available():
        return "cpu"
    if not AUTO_TAKES_GPU:
        _mention_gpu()
        return "cpu"
    return "cuda"


@cache
def _mention_gpu() -> None:
    warnings.warn(
        f"A GPU was found ({torch.cuda.get_device_name()}), but --device auto takes "
        "the CPU in this release; pass --device cuda to use the GPU.",
        HalveWarning,
        stacklevel=3,
    )
