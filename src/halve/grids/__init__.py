"""Integer grids: the few values that a weight may take when it is stored in few bits.

A row of a matrix is cut into groups of consecutive inputs. Each group has a scale and
a zero point of its own, and a weight of it is (code - zero) * scale for a signed code
of `bits` bits. Zero is a value of every grid, exactly, so that a pruned weight stays
pruned.

Signed codes reach one further down than up. Where no zero point makes up for that, a
scale may be negative: the code that has no counterpart goes to the side of the largest
weight (ggml's 4-bit blocks do the same), which costs nothing and in few bits gains
nearly what zero points do. Here are the grids and the choice of scales; solvers choose
the codes.
"""

import math
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halve.errors import QuantizationError

BITS = (8, 4, 3, 2)
# Scales are stored in float16.
_SCALE_BITS = 16
_LARGEST, _SMALLEST = torch.finfo(torch.float16).max, 2.0**-24
_PRECISION = 11
# Ranges that are tried for each group, the last of them this share of the weights' own;
# what lies outside is clipped.
_TRIED, _LEAST = 25, 0.4
# Fewer weights than this share are not worth their mask.
_LEAST_KEPT = 0.2
# Weights that are searched at once: few enough to stay in the cache.
_SLAB = 2**17


@dataclass(frozen=True)
class QuantScheme:
    """How many bits a weight has, and how many weights share a scale.

    Attributes:
        bits: 8, 4, 3 or 2.
        group_size: Consecutive weights of a row with one scale; the last group of a
            row may be shorter.
        symmetric: Whether the zero point is the code 0 everywhere.
        precision: Significant bits of a scale, 11 at most: those of a float16.

    Raises:
        GridError: Other bits, or a group size that is not positive.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = True
    precision: int = _PRECISION

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise QuantizationError(
                f"There is no grid of {self.bits} bits.",
                f"Choose one of {_names()}.",
            )
        if self.group_size < 1:
            raise QuantizationError(
                f"The group size is {self.group_size}, which is not positive.",
                "Pass 1 or more weights that share a scale, such as 128.",
            )

    def __str__(self) -> str:
        return f"int{self.bits}"

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - 1) - 1

    def exact_in(self, dtype: torch.dtype) -> "QuantScheme":
        """Return this grid with scales so short that its values are numbers of a dtype.

        A value has as many significant bits as scale and code have together.

        Raises:
            GridError: None are left for the scale.
        """
        significant = 1 - round(math.log2(torch.finfo(dtype).eps))
        left = significant - (self.bits - 1 if self.symmetric else self.bits)
        if left < 1:
            raise QuantizationError(
                f"{str(dtype).removeprefix('torch.')} has {significant} significant "
                f"bits, too few for the values of an asymmetric {self} grid.",
                "Pass a symmetric grid, or fewer bits.",
            )
        return replace(self, precision=min(left, _PRECISION))

    def groups(self, columns: int) -> int:
        """Return how many groups a row has."""
        return -(-columns // self.group_size)

    def bits_per_weight(self, sparsity: float) -> float:
        """Return the bits that a packed matrix takes, over the number of its weights.

        All codes, or a bit of mask and the codes of what is kept, whichever is less;
        and each group's scale and zero point.

        Args:
            sparsity: Share of weights that are zero, in [0, 1].
        """
        shared = _SCALE_BITS + (0 if self.symmetric else self.bits)
        codes = min(self.bits, 1 + (1 - sparsity) * self.bits)
        return codes + shared / self.group_size

    def shortfall(self, weight: Tensor) -> str | None:
        """Return what keeps a matrix from lying on such a grid, None where it does.

        The scales need not be known: the values of a group lie on a grid where they
        are multiples of one number, their greatest common divisor, and that by codes
        that are few enough.

        Args:
            weight: [rows, columns], finite.

        Cost:
            Some 40 bytes for each of 2^17 weights.
        """
        rows = max(_SLAB // weight.shape[1], 1)
        slabs = (_grouped(self, slab.double()) for slab in weight.split(rows))
        off = sum(int((~_fits(self, slab)).sum()) for slab in slabs)
        if not off:
            return None
        groups = len(weight) * self.groups(weight.shape[1])
        return f"{off} of {groups} groups of weights do not lie on an {self} grid"


def _fits(grid: QuantScheme, groups: Tensor) -> Tensor:
    """Return which groups, [rows, groups, group size] in float64, lie on a grid."""
    least = groups.abs().where(groups != 0, torch.inf).amin(dim=2)
    least = least.where(least.isfinite(), 1)
    low, high = groups.amin(dim=2).clamp_(max=0), groups.amax(dim=2).clamp_(min=0)
    # What is wider has more codes than any grid, and more bits than an int64.
    narrow = torch.maximum(-low, high) < least * 2**grid.bits
    unit = _common_divisor(groups.where(narrow[..., None], 0), least)
    low, high = -low / unit, high / unit
    if grid.symmetric:
        fits = torch.minimum(low, high) <= grid.highest
        return narrow & fits & (torch.maximum(low, high) <= -grid.lowest)
    return narrow & (low + high <= grid.highest - grid.lowest)


def _common_divisor(groups: Tensor, least: Tensor) -> Tensor:
    """Return the largest number of which all values of a group are multiples.

    Args:
        groups: [rows, groups, group size], float32 numbers in float64.
        least: [rows, groups], the smallest that is not 0 in each.
    """
    # A power of two below `least` by the 24 significant bits of a float32.
    fine = least / torch.frexp(least).mantissa / 2**24
    numbers = (groups / fine[..., None]).long()
    while (size := numbers.shape[2]) > 1:
        first, rest = numbers.tensor_split([-(-size // 2)], dim=2)
        rest = torch.nn.functional.pad(rest, (0, size % 2))
        numbers = torch.gcd(first, rest)
    return numbers[..., 0].clamp(min=1) * fine


def _names() -> str:
    return ", ".join(f"int{bits}" for bits in BITS)


def parse_scheme(
    text: str, group_size: int = 128, symmetric: bool = True
) -> QuantScheme:
    """Read a grid: `int8`, `int4`, `int3` or `int2`.

    Raises:
        GridError: The text is none of these, or the group size is not positive.
    """
    match = re.fullmatch(r"int(\d)", text.strip())
    if match is None:
        raise QuantizationError(
            f"{text!r} is not a grid.", f"Choose one of {_names()}."
        )
    return QuantScheme(int(match[1]), group_size, symmetric)


@dataclass(frozen=True)
class QuantParams:
    """The values that the weights of one matrix may take.

    Laws: `decode(codes(z))` is z, bit for bit, for every z that `round` returns; 0 is
    one of them; no other level is nearer to a weight than the one it is rounded to.

    Attributes:
        grid: Bits and groups.
        scale: [rows, groups], float32, not 0; a float16 number of `grid.precision`
            significant bits. Negative where
            the grid is symmetric and the largest weight of the group is positive.
        zero: [rows, groups], float32, the code of 0: an integer, 0 where symmetric.
    """

    grid: QuantScheme
    scale: Tensor
    zero: Tensor

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the nearest codes, [rows, columns] in int8."""
        scale, zero = self._of_columns(weight.shape[1])
        return _nearest_codes(self.grid, weight, scale, zero).to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of codes, [rows, columns] in float32; without rounding.

        A scale has 11 significant bits and a code less its zero point at most 9.
        """
        scale, zero = self._of_columns(codes.shape[1])
        return _values(codes.float(), scale, zero)

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Return the nearest values of the grid, [rows, columns] in float32."""
        scale, zero = self._of_columns(weight.shape[1])
        return _values(_nearest_codes(self.grid, weight, scale, zero), scale, zero)

    def fake_quantize_column(self, values: Tensor, column: int) -> Tensor:
        """Return the nearest values of one column's grid, [rows], as `round` does."""
        group = column // self.grid.group_size
        scale, zero = self.scale[:, group], self.zero[:, group]
        return _values(_nearest_codes(self.grid, values, scale, zero), scale, zero)

    def _of_columns(self, columns: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of each weight, [rows, columns]."""
        size = self.grid.group_size
        return (
            self.scale.repeat_interleave(size, dim=1)[:, :columns],
            self.zero.repeat_interleave(size, dim=1)[:, :columns],
        )


def _nearest_codes(
    grid: QuantScheme, values: Tensor, scale: Tensor, zero: Tensor
) -> Tensor:
    codes = (values / scale).round_().add_(zero)
    return codes.clamp_(grid.lowest, grid.highest)


def _values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return (codes - zero) * scale, in the memory of the codes."""
    # A negative scale makes -0 of 0, which a packed matrix would keep: it counts bits.
    return codes.sub_(zero).mul_(scale).add_(0.0)


def fit_quant_params(
    grid: QuantScheme, weight: Tensor, importance: Tensor | None = None
) -> QuantParams:
    """Choose scales and zero points that lose least when weights are rounded.

    For each group 25 ranges, from that of its weights down to 40 % of it, are tried,
    and the one kept whose rounding has the lowest sum of importance * (w - q)^2. The
    first is that of plain minimum and maximum, so none loses more.

    Args:
        grid: Bits and groups.
        weight: [rows, columns], float32. Zeros count for pruned: they do not matter.
        importance: [columns], of an error in each column; None where all are alike.
            The diagonal of H is what an error costs that nothing makes up for.

    Returns:
        Levels on the device of the weight; a group of zeros has the scale 1.

    Cost:
        25 roundings of the matrix, in memory that does not grow with it.
    """
    columns = weight.shape[1]
    if importance is None:
        importance = weight.new_ones(columns)
    costs = _grouped(grid, importance[None])
    slabs = weight.split(max(_SLAB // columns, 1))
    found = [_search(grid, _grouped(grid, slab), costs) for slab in slabs]
    scales, zeros = zip(*found, strict=True)
    return QuantParams(grid, torch.cat(scales), torch.cat(zeros))


def _grouped(grid: QuantScheme, rows: Tensor) -> Tensor:
    """Return [rows, groups, group size], the last group filled up with zeros."""
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
    for share in _shares(grid):
        tried = _spanning(grid, share * low, share * high)
        loss = _loss(grid, groups, costs, *tried)
        better = loss < least
        scale = torch.where(better, tried[0], scale)
        zero = torch.where(better, tried[1], zero)
        least = torch.where(better, loss, least)
    return scale, zero


def _shares(grid: QuantScheme) -> list[float]:
    """Return the shares of a range to try, falling.

    Plain symmetric scales leave out the lowest code, so that it would reach further
    than the weights do.
    """
    first = grid.lowest / -grid.highest if grid.symmetric else 1.0
    return torch.linspace(first, _LEAST, _TRIED, dtype=torch.float64).tolist()


def _spanning(grid: QuantScheme, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of codes that span ranges which include 0.

    Args:
        grid: Bits, and whether 0 is in the middle.
        low: [rows, groups], at most 0.
        high: [rows, groups], at least 0.
    """
    if grid.symmetric:
        scale = _short(grid, torch.where(-low >= high, low, high) / grid.lowest)
        return scale, torch.zeros_like(scale)
    scale = _short(grid, (high - low) / (grid.highest - grid.lowest))
    zero = (grid.lowest - low / scale).round_().clamp_(grid.lowest, grid.highest)
    return scale, zero


def _short(grid: QuantScheme, scale: Tensor) -> Tensor:
    """Return the nearest float16 number, of few bits, finite and not 0; 1 for 0."""
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
    rounded = _values(_nearest_codes(grid, groups, scale, zero), scale, zero)
    return rounded.sub_(groups).square_().mul_(costs).sum(dim=2)


def schemes_for_bits(
    bits_per_weight: float, group_size: int, symmetric: bool
) -> list[tuple[float, QuantScheme]]:
    """Return the pairs of sparsity and grid that take so many bits a weight.

    For each grid as many weights are kept as there is room for, and besides the finest
    grid on which all weights are kept.

    Raises:
        GridError: There is no pair.
    """
    grids = [QuantScheme(bits, group_size, symmetric) for bits in BITS]
    dense = [
        (0.0, grid) for grid in grids if grid.bits_per_weight(0) <= bits_per_weight
    ]
    empty = [grid.bits_per_weight(1) for grid in grids]
    shares = [(bits_per_weight - e) / g.bits for e, g in zip(empty, grids, strict=True)]
    sparse = [
        (1 - share, grid)
        for share, grid in zip(shares, grids, strict=True)
        if _LEAST_KEPT <= share < 1
    ]
    if not dense + sparse:
        raise QuantizationError(
            f"No grid with groups of {group_size} takes {bits_per_weight:g} bits a "
            "weight.",
            "Pass --target-bits 2 or more, or larger groups.",
        )
    return dense[:1] + sparse
