"""Whether numbers are finite, found without a second tensor as large as theirs."""

from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floating-point numbers holds no NaN and no infinity."""
    if tensor.numel() == 0:
        return True
    least, most = tensor.aminmax()  # NaN where there is one
    return bool(least.isfinite() & most.isfinite())
