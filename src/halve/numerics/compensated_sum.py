"""Sums of many float32 tensors, to about twice the precision of float32.

The rounding errors of the sum are accumulated in a second tensor. The order of the
terms then does not affect the result, except in entries that nearly cancel: several
processes that each add some of the terms get, as good as always, the same bits as one
process that adds all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Adds to a tensor, in place, the corresponding tensors of all other processes.
Reduce = Callable[[Tensor], None]


def no_reduce(_: Tensor) -> None:
    """Add nothing: there is a single process."""


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
        shape of `terms`.

        Args:
            terms: What to add, float32, of the shape of the sum.
        """
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
