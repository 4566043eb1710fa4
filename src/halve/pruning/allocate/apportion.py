"""Whole numbers in given proportions, by the method of largest remainders."""

from collections.abc import Sequence
from fractions import Fraction
from math import floor


def apportion(total: int, claims: Sequence[float | Fraction]) -> tuple[int, ...]:
    """Divide a number of weights in proportion to claims.

    Args:
        total: Number of weights, 0 or more.
        claims: Proportions: not negative, and not all zero unless the total is 0.

    Returns:
        One count for each claim. They add up to the total, and each is its exact quota
        rounded down or up. What rounding down leaves goes to the largest remainders; of
        equal remainders, to the first.
    """
    # Fractions, since floats would not add up exactly.
    exact = [Fraction(claim) for claim in claims]
    whole = sum(exact, Fraction(0)) or Fraction(1)
    quotas = [total * claim / whole for claim in exact]
    counts = [floor(quota) for quota in quotas]
    left = total - sum(counts)
    order = sorted(range(len(counts)), key=lambda i: counts[i] - quotas[i])
    for index in order[:left]:
        counts[index] += 1
    return tuple(counts)
