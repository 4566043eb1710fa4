"""Check that numbers are finite, without a second tensor of the same size."""

from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity."""
    if tensor.numel() == 0:
        return True
    smallest, largest = tensor.aminmax()  # both are NaN if any element is
    return bool(smallest.isfinite() & largest.isfinite())
