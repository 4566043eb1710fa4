"""Whether a matrix lies on a grid, found without knowing its scales."""

import torch
from torch import Tensor

from halve.grids.fit import split_groups
from halve.grids.scheme import QuantScheme

# Weights that are checked at once: few enough to stay in the cache.
_SLAB = 2**17


def grid_shortfall(grid: QuantScheme, weight: Tensor) -> str | None:
    """Return what keeps a matrix from lying on such a grid, None where it does.

    The values of a group lie on a grid where they are multiples of one number, their
    greatest common divisor, by codes that are few enough.

    Args:
        grid: Bits, groups and symmetry.
        weight: [rows, columns], finite.

    Cost:
        Some 40 bytes for each of 2^17 weights.
    """
    rows = max(_SLAB // weight.shape[1], 1)
    slabs = (split_groups(grid, slab.double()) for slab in weight.split(rows))
    off = sum(int((~_fits(grid, slab)).sum()) for slab in slabs)
    if not off:
        return None
    groups = len(weight) * grid.groups(weight.shape[1])
    return f"{off} of {groups} groups of weights do not lie on an {grid} grid"


def _fits(grid: QuantScheme, groups: Tensor) -> Tensor:
    """Return which groups, [rows, groups, group size] in float64, lie on a grid."""
    least = groups.abs().where(groups != 0, torch.inf).amin(dim=2)
    least = least.where(least.isfinite(), 1)
    low, high = groups.amin(dim=2).clamp_(max=0), groups.amax(dim=2).clamp_(min=0)
    # A wider range has more codes than any grid, and more bits than an int64.
    narrow = torch.maximum(-low, high) < least * 2**grid.bits
    unit = common_divisor(groups.where(narrow[..., None], 0), least)
    low, high = -low / unit, high / unit
    if grid.midrise:
        # Odd multiples of half a scale; zeros are weights that a mask leaves out.
        odd = (groups / unit[..., None]).fmod(2) != 0
        whole = (odd | (groups == 0)).all(dim=2)
        return narrow & whole & (torch.maximum(low, high) <= 2**grid.bits - 1)
    if grid.symmetric:
        # One side may reach the lowest code, by a scale of either sign.
        fits = torch.minimum(low, high) <= grid.highest
        return narrow & fits & (torch.maximum(low, high) <= -grid.lowest)
    return narrow & (low + high <= grid.highest - grid.lowest)


def common_divisor(groups: Tensor, least: Tensor) -> Tensor:
    """Return the largest number of which all values of a group are multiples.

    Args:
        groups: [rows, groups, group size], float32 numbers in float64.
        least: [rows, groups], the smallest nonzero magnitude in each.
    """
    # A power of two below `least` by the 24 significant bits of a float32: all values
    # are integer multiples of it.
    unit = least / torch.frexp(least).mantissa / 2**24
    numbers = (groups / unit[..., None]).long()
    while (size := numbers.shape[2]) > 1:  # pairwise, halving the group each time
        first, rest = numbers.tensor_split([-(-size // 2)], dim=2)
        rest = torch.nn.functional.pad(rest, (0, size % 2))
        numbers = torch.gcd(first, rest)
    return numbers[..., 0].abs().clamp(min=1) * unit
