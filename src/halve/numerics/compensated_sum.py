"""Sums of many float32 tensors, to about twice the precision of float32.

The rounding errors of the sum are accumulated in a second tensor. The order of the
terms then does not affect the result, except in entries that nearly cancel: several
processes that each add some of the terms get, as good as always, the same bits as one
process that adds all of them.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from halve._compat.triton import has_triton
from halve.errors import HalveWarning

# Adds to a tensor, in place, the corresponding tensors of all other processes.
Reduce = Callable[[Tensor], None]
# Adds the third matrix to the first, and the rounding errors to the second.
_AddTwoSum = Callable[[Tensor, Tensor, Tensor], None]
_MATRIX = 2  # the dimensions of what the kernel adds


def no_reduce(_: Tensor) -> None:
    """Add nothing: there is a single process."""


@cache
def _fused(device: torch.device) -> _AddTwoSum | None:
    """Return the kernel that adds to sums on a device; None where there is none.

    Warns:
        HalveWarning: There should be one, but it cannot be compiled.
    """
    if not has_triton(device):
        return None
    try:
        from halve.numerics.two_sum_kernel import add_two_sum  # noqa: PLC0415

        add_two_sum(*torch.zeros(3, 1, 1, device=device))  # compiles it
    except torch.OutOfMemoryError:
        raise
    # Triton raises its own errors, the compiler's and the driver's.
    except Exception as error:  # noqa: BLE001
        reason = " ".join(str(error).split())[:160]
        warnings.warn(
            "The kernel for compensated sums cannot be compiled "
            f"({type(error).__name__}: {reason}); torch adds instead, with the same "
            "result and some percent slower.",
            HalveWarning,
            stacklevel=2,
        )
        return None
    return add_two_sum


@dataclass(frozen=True)
class CompensatedSum:
    """The unevaluated sum `high + low`, with |low| much smaller than |high|.

    Both tensors are written to; they may be views of the caller's.

    Attributes:
        high: The sum, rounded to float32.
        low: The accumulated rounding errors of `high`, of the same shape.
    """

    high: Tensor
    low: Tensor

    @classmethod
    def zeros(cls, *shape: int, device: torch.device) -> "CompensatedSum":
        """Return an empty sum."""
        # Two allocations, so that the memory of one can be freed before the other.
        return cls(
            torch.zeros(*shape, device=device), torch.zeros(*shape, device=device)
        )

    def add(self, terms: Tensor) -> None:
        """Add a tensor to the sum; the tensor is overwritten.

        Knuth's TwoSum, elementwise: s = fl(a + b) and the exact error of that rounding,
        e = (a - (s - b')) + (b - b') with b' = s - a, where a is `high` and b is
        `terms`. Takes eight operations per element and two temporary tensors of the
        shape of `terms`; on a GPU, one pass over the memory and no temporary tensor.

        Args:
            terms: What to add, float32, of the shape of the sum.
        """
        fused = _fused(self.high.device) if self.high.dim() == _MATRIX else None
        if fused is not None:
            fused(self.high, self.low, terms)
            return
        total = self.high + terms  # s
        virtual = total - self.high  # b' = s - a, the part of b that s includes
        terms -= virtual  # b - b', the part of b that was rounded off
        virtual -= total  # b' - s, which is -a', minus the part of a that s includes
        self.high.add_(virtual).add_(terms)  # (a - a') + (b - b') = e
        self.low.add_(self.high)
        self.high.copy_(total)

    def total(self, reduce: Reduce = no_reduce) -> Tensor:
        """Return the sum in float32, rounded once.

        Args:
            reduce: Called with this process's sum in float64; all processes must call
                this method together.
        """
        total = self.high.double().add_(self.low).contiguous()
        reduce(total)
        return total.float()
