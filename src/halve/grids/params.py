"""Scales and zero points of one matrix: quantize, dequantize, fake-quantize."""

from dataclasses import dataclass

import torch
from torch import Tensor

from halve.grids.scheme import QuantScheme


@dataclass(frozen=True)
class QuantParams:
    """The values that the weights of one matrix may take: (code - zero) * scale.

    Laws: `dequantize(quantize(z))` is z, bit for bit, for every z that `fake_quantize`
    returns; 0 is a value of every group unless the grid is midrise; no other value is
    nearer to a weight than the one it is rounded to.

    Attributes:
        grid: Bits and groups.
        scale: [rows, groups], float32, not 0; a float16 number of `grid.precision`
            significant bits. Negative where the grid is symmetric and the largest
            weight of the group is positive.
        zero: [rows, groups], float32, the code of 0: an integer, 0 where symmetric;
            -1/2 where the grid is midrise.
    """

    grid: QuantScheme
    scale: Tensor
    zero: Tensor

    def to(self, device: torch.device) -> "QuantParams":
        """Return the same parameters on a device, without a copy where they are."""
        return QuantParams(self.grid, self.scale.to(device), self.zero.to(device))

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the nearest codes, [rows, columns] in int8."""
        scale, zero = self._of_columns(weight.shape[1])
        return nearest_codes(self.grid, weight, scale, zero).to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of codes, [rows, columns] in float32; without rounding.

        A scale has 11 significant bits and a code less its zero point at most 9.
        """
        scale, zero = self._of_columns(codes.shape[1])
        return values_of(codes.float(), scale, zero)

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Return the nearest values of the grid, [rows, columns] in float32."""
        scale, zero = self._of_columns(weight.shape[1])
        return values_of(nearest_codes(self.grid, weight, scale, zero), scale, zero)

    def fake_quantize_kept(self, weight: Tensor) -> Tensor:
        """Return the nearest values of the grid, and 0 for weights that are 0.

        The two differ where the grid is midrise: 0 is then none of its values, and
        stands for a pruned weight.
        """
        rounded = self.fake_quantize(weight)
        return rounded.where(weight != 0, 0) if self.grid.midrise else rounded

    def fake_quantize_column(self, values: Tensor, column: int) -> Tensor:
        """Return the nearest values of one column's grid, [rows]."""
        group = column // self.grid.group_size
        scale, zero = self.scale[:, group], self.zero[:, group]
        return values_of(nearest_codes(self.grid, values, scale, zero), scale, zero)

    def _of_columns(self, columns: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of each weight, [rows, columns]."""
        size = self.grid.group_size
        return (
            self.scale.repeat_interleave(size, dim=1)[:, :columns],
            self.zero.repeat_interleave(size, dim=1)[:, :columns],
        )


def nearest_codes(
    grid: QuantScheme, values: Tensor, scale: Tensor, zero: Tensor
) -> Tensor:
    """Return the codes of a grid whose values are nearest, as floats."""
    codes = values / scale
    # Midrise values are (code + 1/2) * scale: all of [code, code + 1) rounds to code.
    codes = codes.floor_() if grid.midrise else codes.round_().add_(zero)
    return codes.clamp_(grid.lowest, grid.highest)


def values_of(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return (codes - zero) * scale, in the memory of the codes."""
    # A negative scale makes -0 of 0, and a packed matrix, which drops a weight only
    # where all its bits are zero, would store it.
    return codes.sub_(zero).mul_(scale).add_(0.0)
