"""Whole numbers in given proportions: the method of the largest remainders."""

from collections.abc import Sequence
from fractions import Fraction
from math import floor


def apportion(total: int, claims: Sequence[float | Fraction]) -> tuple[int, ...]:
    """Divide a number of weights in proportion to claims, to the last one.

    Args:
        total: Of weights, 0 or more.
        claims: Not negative, and not all zero unless the total is 0.

    Returns:
        One count for each claim. They add up to the total, and each is its exact share
        rounded down or up; what rounding down leaves goes to the largest remainders,
        of equal ones to the first.
    """
    exact = [Fraction(claim) for claim in claims]
    whole = sum(exact, Fraction(0)) or Fraction(1)
    shares = [total * claim / whole for claim in exact]
    counts = [floor(share) for share in shares]
    left = total - sum(counts)
    order = sorted(range(len(counts)), key=lambda i: counts[i] - shares[i])
    for index in order[:left]:
        counts[index] += 1
    return tuple(counts)
