"""Check that numbers are finite, without a second tensor of the same size."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity.

    Waits for the device; see `finite_flag`.
    """
    return bool(finite_flag(tensor))


def finite_flag(tensor: Tensor) -> Tensor:
    """Return what `is_finite` does as a tensor on the same device: a scalar, bool.

    A GPU is not waited for, so that flags of many batches can be read at once.
    """
    if tensor.numel() == 0:
        return tensor.new_ones((), dtype=torch.bool)
    smallest, largest = tensor.aminmax()  # both are NaN if any element is
    return smallest.isfinite() & largest.isfinite()
