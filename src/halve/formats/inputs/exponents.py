"""E8M0: scales that are powers of two, one byte each (OCP Microscaling Formats 1.0)."""

import torch
from torch import Tensor


def as_float32(scales: Tensor) -> Tensor:
    """Return scales in float32; bytes and E8M0 numbers are exponents, of bias 127.

    Byte 255 is NaN, as the specification says; transformers makes it infinity. Neither
    is a weight that Halve accepts.
    """
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()
