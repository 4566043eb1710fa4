"""Sums of many float32 tensors, to about twice the precision of float32.

What float32 rounds off is kept in a second tensor. So the order of the terms does not
show in a sum, but for entries that nearly cancel: several processes that each have some
of the terms find, as good as always, the very bits that one with all of them finds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Adds to a tensor, in place, what other processes have in its place.
Reduce = Callable[[Tensor], None]


def no_reduce(_: Tensor) -> None:
    """Add nothing: there is no other process."""


@dataclass(frozen=True)
class CompensatedSum:
    """high + low, |low| being a small share of |high|; both are written to.

    Attributes:
        high: The sum as float32 has it.
        low: What is missing from it; of the same shape.
    """

    high: Tensor
    low: Tensor

    @classmethod
    def zeros(cls, *shape: int, device: torch.device) -> "CompensatedSum":
        """Return an empty sum."""
        # Two of them, so that the memory of one can be freed.
        return cls(
            torch.zeros(*shape, device=device), torch.zeros(*shape, device=device)
        )

    def add(self, terms: Tensor) -> None:
        """Add terms, which are overwritten; eight operations each (Knuth's TwoSum).

        Costs two tensors of their shape.
        """
        total = self.high + terms
        arrived = total - self.high  # of the terms
        terms -= arrived
        arrived -= total
        self.high.add_(arrived).add_(terms)  # what did not arrive: of both
        self.low.add_(self.high)
        self.high.copy_(total)

    def total(self, reduce: Reduce = no_reduce) -> Tensor:
        """Return the sum in float32, rounded once.

        Args:
            reduce: Given this process's share of it in float64.
        """
        total = self.high.double().add_(self.low).contiguous()
        reduce(total)
        return total.float()
