"""Scales and zero points of a matrix of which only the values are known."""

import torch
from torch import Tensor

from halve.grids.check import common_divisor
from halve.grids.fit import split_groups
from halve.grids.params import QuantParams
from halve.grids.scheme import QuantScheme

# Weights that are processed at once: few enough to stay in the cache.
_SLAB = 2**17


def recover_quant_params(scheme: QuantScheme, weight: Tensor) -> QuantParams | None:
    """Return parameters of a grid on which a matrix lies, None where it does not.

    The scale of a group is the greatest common divisor of its values, or a fraction of
    it: where all codes of a group are multiples of k, the divisor is k scales and may
    have too many bits for a float16, and one k-th of it is tried.

    The parameters need not be those that the matrix was quantized with, but dequantize
    to the same values.

    Args:
        scheme: Bits, groups, symmetry.
        weight: [rows, columns], finite.

    Cost:
        Some 40 bytes for each of 2^17 weights, and two passes over the matrix.
    """
    rows = max(_SLAB // weight.shape[1], 1)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for slab in weight.split(rows):
        groups = split_groups(scheme, slab.double())
        scale, zero = _recover(scheme, groups)
        scales.append(scale.float())
        zeros.append(zero.float())
    params = QuantParams(scheme, torch.cat(scales), torch.cat(zeros))
    restored = params.fake_quantize_kept(weight.float())
    return params if torch.equal(restored, weight.float()) else None


def _recover(scheme: QuantScheme, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of each group, [rows, groups] in float64.

    Args:
        scheme: Bits, symmetry.
        groups: [rows, groups, group size], float64.
    """
    magnitudes = groups.abs()
    least = magnitudes.where(groups != 0, torch.inf).amin(dim=2)
    least = least.where(least.isfinite(), 1)
    # The divisor of a wider range is not on any grid; 0 keeps it within an int64.
    narrow = magnitudes.amax(dim=2) < least * 2**scheme.bits
    unit = common_divisor(groups.where(narrow[..., None], 0), least)
    scale = _float16_fraction(2 * unit if scheme.midrise else unit, scheme)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    if scheme.midrise:
        return scale, torch.full_like(scale, -0.5)
    if scheme.symmetric:
        # The lowest code has no counterpart: the larger side needs it.
        return scale.copysign(high.abs() - low.abs()) * -1, torch.zeros_like(scale)
    zero = (scheme.lowest - low.clamp(max=0) / scale).round()
    return scale, zero.clamp(scheme.lowest, scheme.highest)


def _float16_fraction(unit: Tensor, scheme: QuantScheme) -> Tensor:
    """Return unit / k with the smallest k for which that is a float16, exactly."""
    scale = unit
    for k in range(1, 2**scheme.bits):
        tried = unit / k
        exact = tried.half().double() == tried
        scale = torch.where((scale.half().double() != scale) & exact, tried, scale)
    return scale
