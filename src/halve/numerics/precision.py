"""How precise float32 matrix products are on CUDA: as float32, or as TF32.

TF32 rounds the factors of a product to 10 bits after the leading one, as many as
float16 has, and adds in float32. Tensor cores then compute it several times faster. The
names are those of `torch.set_float32_matmul_precision`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FULL_PRECISION = "highest"


@contextmanager
def matmul_precision(name: str, device: torch.device) -> Iterator[None]:
    """Set the precision of float32 products for the duration of the context.

    Torch's setting belongs to the process; the previous one is restored afterwards.

    Args:
        name: `highest` for float32, `high` for TF32.
        device: Where the products are computed; nothing is set unless it is CUDA.
    """
    previous = torch.get_float32_matmul_precision()
    if device.type != "cuda" or name == previous:
        yield
        return
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)
