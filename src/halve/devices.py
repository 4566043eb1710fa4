"""The devices that Halve runs on, and which one `--device auto` stands for."""

import warnings
from functools import cache

import torch

from halve.errors import HalveError, HalveWarning

# Whether `auto` takes a GPU where there is one. False as long as no release has passed
# its checks on one: then a GPU is used only where the user names it. The help of
# `--device` (options/shared.py) says the same.
AUTO_TAKES_GPU = False
_DEVICES = ("cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """Return a device by name.

    Raises:
        HalveError: The device is unknown or cannot be used on this machine.
    """
    if name == "auto":
        return torch.device(auto_device())
    if name.partition(":")[0] not in _DEVICES:
        raise HalveError(
            f"{name!r} is not a device that Halve supports.",
            f"Use --device auto, {' or '.join(_DEVICES)}.",
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise HalveError(
            f"The device {name!r} cannot be used on this machine "
            f"({str(error).splitlines()[0][:120]}).",
            "Use --device auto or --device cpu.",
        ) from error
    return device


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
