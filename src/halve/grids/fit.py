"""The choice of scales and zero points: a search over clipped ranges."""

import torch
from torch import Tensor

from halve.grids.params import QuantParams, nearest_codes, values_of
from halve.grids.scheme import QuantScheme

_LARGEST, _SMALLEST = torch.finfo(torch.float16).max, 2.0**-24
# Ranges that are tried for each group, the last of them this fraction of the weights'
# range; what lies outside is clipped.
_TRIED, _MIN_RANGE = 25, 0.4
# Weights that are searched at once: few enough to stay in the cache; on a GPU enough to
# be worth the hundreds of launches.
_SLAB, _GPU_SLAB = 2**17, 2**24


def fit_quant_params(
    grid: QuantScheme, weight: Tensor, importance: Tensor | None = None
) -> QuantParams:
    """Choose scales and zero points with the lowest weighted rounding error.

    For each group 25 ranges, from that of its weights down to 40 % of it, are tried,
    and the one is taken whose rounding has the lowest sum of importance * (w - q)^2.
    The first is that of plain minimum and maximum, so none loses more.

    Args:
        grid: Bits and groups.
        weight: [rows, columns], float32. Zeros are pruned weights: they do not count.
        importance: [columns], of an error in each column; None where all are alike.
            The diagonal of H is what an error costs that nothing compensates.

    Returns:
        Parameters on the device of the weight; a group of zeros has the scale 1.

    Cost:
        25 roundings of the matrix, in memory that does not grow with it.
    """
    columns = weight.shape[1]
    if importance is None:
        importance = weight.new_ones(columns)
    costs = split_groups(grid, importance[None])
    slab = _SLAB if weight.device.type == "cpu" else _GPU_SLAB
    slabs = weight.split(max(slab // columns, 1))
    fitted = [_search(grid, split_groups(grid, rows), costs) for rows in slabs]
    scales, zeros = zip(*fitted, strict=True)
    return QuantParams(grid, torch.cat(scales), torch.cat(zeros))


def split_groups(grid: QuantScheme, rows: Tensor) -> Tensor:
    """Return [rows, groups, group size], the last group padded with zeros."""
    columns = rows.shape[1]
    groups, size = grid.groups(columns), min(grid.group_size, columns)
    padded = torch.nn.functional.pad(rows, (0, groups * size - columns))
    return padded.view(len(rows), groups, size)


def _search(grid: QuantScheme, groups: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best scale and zero point of each group, [rows, groups] each.

    Args:
        grid: Bits and groups.
        groups: [rows, groups, group size], the weights.
        costs: [1, groups, group size], the importance of each.
    """
    costs = costs * (groups != 0)
    low, high = groups.amin(dim=2).clamp_(max=0), groups.amax(dim=2).clamp_(min=0)
    scale, zero = _spanning(grid, low, high)
    least = torch.full_like(low, torch.inf)
    for fraction in _fractions(grid):
        tried = _spanning(grid, fraction * low, fraction * high)
        loss = _loss(grid, groups, costs, *tried)
        better = loss < least
        scale = torch.where(better, tried[0], scale)
        zero = torch.where(better, tried[1], zero)
        least = torch.where(better, loss, least)
    return scale, zero


def _fractions(grid: QuantScheme) -> list[float]:
    """Return the fractions of a range to try, in falling order.

    Plain symmetric scales leave out the lowest code, so that it would reach further
    than the weights do: the first fraction is above 1 for them.
    """
    skewed = grid.symmetric and not grid.midrise
    first = grid.lowest / -grid.highest if skewed else 1.0
    return torch.linspace(first, _MIN_RANGE, _TRIED, dtype=torch.float64).tolist()


def _spanning(grid: QuantScheme, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of codes that span ranges which include 0.

    Args:
        grid: Bits, and whether 0 is in the middle.
        low: [rows, groups], at most 0.
        high: [rows, groups], at least 0.
    """
    if grid.midrise:
        scale = _shorten(grid, torch.maximum(-low, high) / (grid.highest + 0.5))
        return scale, torch.full_like(scale, -0.5)
    if grid.symmetric:
        # The sign of the scale puts the lowest code on the side of the largest weight.
        scale = _shorten(grid, torch.where(-low >= high, low, high) / grid.lowest)
        return scale, torch.zeros_like(scale)
    scale = _shorten(grid, (high - low) / (grid.highest - grid.lowest))
    zero = (grid.lowest - low / scale).round_().clamp_(grid.lowest, grid.highest)
    return scale, zero


def _shorten(grid: QuantScheme, scale: Tensor) -> Tensor:
    """Return the nearest float16 of few significant bits, finite, not 0; 1 for 0."""
    mantissa, exponent = torch.frexp(scale.abs())
    short = torch.ldexp(
        (mantissa * 2**grid.precision).round() / 2**grid.precision, exponent
    )
    size = short.clamp_(_SMALLEST, _LARGEST).half().float()
    return torch.where(scale == 0, 1, size.copysign_(scale))


def _loss(
    grid: QuantScheme, groups: Tensor, costs: Tensor, scale: Tensor, zero: Tensor
) -> Tensor:
    """Return the sum of costs * (w - q)^2 of each group, [rows, groups]."""
    scale, zero = scale[..., None], zero[..., None]
    rounded = values_of(nearest_codes(grid, groups, scale, zero), scale, zero)
    return rounded.sub_(groups).square_().mul_(costs).sum(dim=2)
