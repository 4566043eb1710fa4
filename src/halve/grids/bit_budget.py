"""What takes a given number of bits a weight: a sparsity and a grid, or two grids."""

from itertools import pairwise

from halve.errors import QuantizationError
from halve.grids.scheme import BITS, QuantScheme

# With a smaller fraction of kept weights the mask takes more than it saves.
_MIN_KEPT = 0.2


def schemes_for_bits(
    bits_per_weight: float, group_size: int, symmetric: bool
) -> list[tuple[float, QuantScheme]]:
    """Return the pairs of sparsity and grid that take so many bits a weight.

    For each grid as many weights are kept as there are bits for; and besides the finest
    grid on which all weights are kept.

    Args:
        bits_per_weight: Mask, codes and scales together.
        group_size: Weights that share a scale.
        symmetric: Whether grids have no zero points.

    Raises:
        QuantizationError: There is no pair.
    """
    grids = [QuantScheme(bits, group_size, symmetric) for bits in BITS]
    dense = [
        (0.0, grid) for grid in grids if grid.bits_per_weight(0) <= bits_per_weight
    ]
    # With a mask over its codes a grid needs no code for zero.
    masked = [grid.without_zero() for grid in grids]
    # What mask and scales take: bits where nothing is kept.
    empty = [grid.bits_per_weight(1) for grid in masked]
    kept = [(bits_per_weight - e) / g.bits for e, g in zip(empty, masked, strict=True)]
    sparse = [
        (1 - fraction, grid)
        for fraction, grid in zip(kept, masked, strict=True)
        if _MIN_KEPT <= fraction < 1
    ]
    if not dense + sparse:
        raise QuantizationError(
            f"No grid with groups of {group_size} takes {bits_per_weight:g} bits a "
            "weight.",
            "Allow 2 bits or more (--target-bits), or larger groups (--group-size).",
        )
    whole = [(sparsity, grid.without_zero()) for sparsity, grid in dense[:1]]
    return whole + sparse


def grids_around(
    bits_per_weight: float, group_size: int, symmetric: bool
) -> tuple[QuantScheme, QuantScheme] | None:
    """Return the finest grid that takes no more bits a weight, and the next finer one.

    All weights are kept on both. Some matrices on one and the rest on the other take
    the bits that neither takes.

    Args:
        bits_per_weight: Codes and scales together.
        group_size: Weights that share a scale.
        symmetric: Whether grids have no zero points.

    Returns:
        None where no grid is coarse enough, or none is finer.
    """
    grids = [QuantScheme(bits, group_size, symmetric) for bits in BITS]  # finest first
    for finer, coarser in pairwise(grid.without_zero() for grid in grids):
        if coarser.bits_per_weight(0) <= bits_per_weight < finer.bits_per_weight(0):
            return coarser, finer
    return None
