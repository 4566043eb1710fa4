"""Sparsities of blocks from their errors: what suffers more is pruned less.

Each block is given S + b d, where S is the sparsity of the whole model, b a strength,
and d falls linearly in the block's error from 1 (least) to -1 (greatest). The idea that
a layer's own error at a uniform sparsity tells how much it can lose is that of OWL (Yin
et al., 2024) and its heirs; that the whole budget is met to one weight is ours.
"""

from collections.abc import Sequence
from fractions import Fraction

from halve.pruning.allocate.apportion import apportion

# Enough to halve an interval of width 2 down to the spacing of floats.
_HALVINGS = 60


def spread_sparsity(
    errors: Sequence[float],
    weights: Sequence[int],
    sparsity: float,
    strength: float,
) -> tuple[float, ...]:
    """Return a sparsity for each block.

    Args:
        errors: Of the blocks, all pruned to the same sparsity; finite.
        weights: Prunable weights in each, positive.
        sparsity: S, of all blocks together, in (0, 1).
        strength: b, not negative: the first and the last sparsity lie 2 b apart, unless
            one of them meets a bound.

    Returns:
        Sparsities between S / 2 and (1 + S) / 2, of mean S over all weights to the
        rounding of floats. Where an error is greater the sparsity is never greater;
        equal errors or no strength give S to all.
    """
    least, most = min(errors), max(errors)
    if most == least or strength == 0:
        return (sparsity,) * len(errors)
    wanted = [
        sparsity + strength * (1 - 2 * (error - least) / (most - least))
        for error in errors
    ]
    return _centred(wanted, weights, sparsity)


def _centred(
    wanted: Sequence[float], weights: Sequence[int], sparsity: float
) -> tuple[float, ...]:
    """Move all by the same, within bounds, so that their weighted mean is S."""
    bounds = sparsity / 2, (1 + sparsity) / 2
    reach = 1 + max(map(abs, wanted))
    low, high = -reach, reach
    moved: tuple[float, ...] = tuple(wanted)
    for _ in range(_HALVINGS):
        shift = (low + high) / 2
        moved = tuple(min(max(value + shift, bounds[0]), bounds[1]) for value in wanted)
        if _mean(moved, weights) > sparsity:
            high = shift
        else:
            low = shift
    return moved


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def apportion_zeros(
    total: int, sparsities: Sequence[float], blocks: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Return how many weights each matrix of each block loses.

    Args:
        total: Weights that the whole model loses.
        sparsities: Of the blocks.
        blocks: Weights in each matrix of each block.

    Returns:
        Counts that add up to the total. Each block's is its share rounded to a whole
        number, and each matrix's is that of its block likewise.
    """
    claims = [
        Fraction(sparsity) * sum(matrices)
        for sparsity, matrices in zip(sparsities, blocks, strict=True)
    ]
    counts = apportion(total, claims)
    return tuple(map(apportion, counts, blocks))
