"""What is reported of the divergence of two models, from that of every token."""

import math
from typing import Any

import torch
from torch import Tensor

# Per cent of the tokens.
_QUANTILES = (0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)
# Bins of the histogram: so many of equal width in log10 between these, in nats.
_BINS, _LOWEST, _HIGHEST = 48, 1e-8, 1e2


def summarize(divergences: list[Tensor], agreements: list[Tensor]) -> dict[str, Any]:
    """Return the fields of a `ComparisonRecord` that tell of divergence.

    Args:
        divergences: KL in nats of each token, [length] for each segment.
        agreements: Whether both models rank the same token first, in the same shape.
    """
    values = torch.cat(divergences)
    ordered = values.sort().values
    return {
        "kl_mean": float(values.mean()),
        "kl_median": float(values.median()),
        "kl_99": _quantile(ordered, 99),
        "kl_max": float(ordered[-1]),
        "kl_error": _standard_error(divergences),
        "kl_quantiles": {f"{q:g}": _quantile(ordered, q) for q in _QUANTILES},
        "kl_histogram": _histogram(values),
        "agreement": float(torch.cat(agreements).double().mean()),
        "agreement_error": _standard_error(agreements),
    }


def _quantile(ordered: Tensor, per_cent: float) -> float:
    """Return the smallest value that so many of the values do not exceed."""
    # Rounded first: 0.999 * 1000 is a little more than 999 in binary.
    rank = math.ceil(round(per_cent * len(ordered) / 100, 6))
    return float(ordered[max(rank, 1) - 1])


def _standard_error(segments: list[Tensor]) -> float | None:
    """Return the standard error of the mean, from the spread of the segments' means.

    None for one segment. Tokens of one segment are not independent; segments are, or
    nearly.
    """
    if len(segments) == 1:
        return None
    means = torch.stack([segment.double().mean() for segment in segments])
    return float(means.std()) / len(segments) ** 0.5


def _histogram(values: Tensor) -> tuple[int, ...]:
    """Return the number of tokens below the lowest bin, and in each bin.

    Values above the highest bin count in it.
    """
    low, high = math.log10(_LOWEST), math.log10(_HIGHEST)
    logs = values.double().clamp(min=_LOWEST / 10).log10()
    places = ((logs - low) / (high - low) * _BINS).floor()
    indices = places.clamp(-1, _BINS - 1).long() + 1
    return tuple(torch.bincount(indices, minlength=_BINS + 1).tolist())
