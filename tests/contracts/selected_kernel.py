"""What `HALVE_KERNEL` selects, printed by a process of its own."""

import torch

from halve.formats.bitmask import pack
from halve.runtime.cpu.kernels import kernels
from halve.runtime.cpu.operators import packed_linear


def print_selected_kernel() -> None:
    """Print the sum of two equal products of ones, and the kernel's name."""
    p = pack(torch.eye(3))
    x = torch.ones(1, 3)
    first, second = (
        packed_linear(x, p.values, p.mask, p.offsets, None, 3) for _ in range(2)
    )
    assert torch.equal(first, second)
    selected = kernels()
    print(second.sum().item(), selected.name if selected else "none")  # noqa: T201
