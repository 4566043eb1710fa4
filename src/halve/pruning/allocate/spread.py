"""Sparsities of blocks from their errors: blocks with greater errors are pruned less.

Block i gets sparsity S + b d_i, where S is the sparsity of the whole model and b the
strength; d_i falls linearly in the block's error e_i, from 1 at the smallest error to
-1 at the greatest:

    d_i = 1 - 2 (e_i - e_min) / (e_max - e_min).

That the error of a layer at a uniform sparsity indicates how much it can lose is the
idea of OWL (Yin et al., 2024) and its successors. Meeting the sparsity of the whole
model to one weight is not in those papers.
"""

from collections.abc import Sequence
from fractions import Fraction

from halve.pruning.allocate.apportion import apportion

# Enough bisections to reduce an interval of width 2 to the spacing of floats.
_BISECTIONS = 60


def spread_sparsity(
    errors: Sequence[float],
    weights: Sequence[int],
    sparsity: float,
    strength: float,
) -> tuple[float, ...]:
    """Return a sparsity for each block.

    Args:
        errors: Errors e of the blocks, all pruned to the same sparsity; finite.
        weights: Number of prunable weights in each block, positive.
        sparsity: S, the sparsity of all blocks together, in (0, 1).
        strength: b, not negative. The smallest and the greatest sparsity differ by 2 b
            unless one of them reaches a bound.

    Returns:
        Sparsities between S / 2 and (1 + S) / 2 whose mean over all weights is S, up to
        rounding. A block with a greater error never gets a greater sparsity. All get S
        if the errors are equal or the strength is 0.
    """
    low, high = min(errors), max(errors)
    if high == low or strength == 0:
        return (sparsity,) * len(errors)
    targets = [
        sparsity + strength * (1 - 2 * (error - low) / (high - low)) for error in errors
    ]
    return _center(targets, weights, sparsity)


def _center(
    targets: Sequence[float], weights: Sequence[int], sparsity: float
) -> tuple[float, ...]:
    """Shift all targets by one number and clip them, so that the weighted mean is S.

    The mean of min(max(target + shift, lower), upper) never falls as the shift grows,
    so bisection finds the shift.
    """
    lower, upper = sparsity / 2, (1 + sparsity) / 2
    reach = 1 + max(map(abs, targets))  # shifts everything to one of the bounds
    low, high = -reach, reach
    shifted: tuple[float, ...] = tuple(targets)
    for _ in range(_BISECTIONS):
        shift = (low + high) / 2
        shifted = tuple(min(max(target + shift, lower), upper) for target in targets)
        if _mean(shifted, weights) > sparsity:
            high = shift
        else:
            low = shift
    return shifted


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def apportion_zeros(
    total: int, sparsities: Sequence[float], blocks: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Return the number of weights to prune in each matrix of each block.

    Args:
        total: Number of weights to prune in the whole model.
        sparsities: Sparsity of each block.
        blocks: Number of weights of each matrix of each block.

    Returns:
        Counts that add up to the total. Each block's is its sparsity times its weights,
        rounded to a whole number; the same holds for the matrices within a block.
    """
    claims = [
        Fraction(sparsity) * sum(matrices)
        for sparsity, matrices in zip(sparsities, blocks, strict=True)
    ]
    counts = apportion(total, claims)
    return tuple(map(apportion, counts, blocks))
