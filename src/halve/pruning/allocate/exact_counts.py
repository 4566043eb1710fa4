"""Zeros of every matrix, so that the whole model has exactly the requested number."""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from halve.errors import TargetMissedError
from halve.patterns import Exact, Patterns, parse_pattern
from halve.pruning.allocate.apportion import apportion
from halve.pruning.allocate.spread import apportion_zeros
from halve.pruning.plan import Plan
from halve.pruning.saliency import spread_by_saliency
from halve.records import BlockRecord


def total_zeros(plan: Plan) -> int:
    """Return the number of weights to prune in the whole model."""
    return parse_pattern(plan.options.sparsity).count(plan.layout.prunable)


def exact_patterns(plan: Plan, sparsities: Sequence[float]) -> list[Patterns]:
    """Return the patterns of each block's matrices that add up to the requested zeros.

    Args:
        plan: The run.
        sparsities: Sparsity of each block.
    """
    blocks = [[m.elements for m in block.matrices] for block in plan.layout.blocks]
    zeros = apportion_zeros(total_zeros(plan), sparsities, blocks)
    return [
        {
            m.name: Exact(count, m.elements)
            for m, count in zip(block.matrices, counts, strict=True)
        }
        for block, counts in zip(plan.layout.blocks, zeros, strict=True)
    ]


def zeros_by_saliency(plan: Plan, saliency: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of weights to prune in each matrix of which no rule speaks.

    Together they have exactly the requested sparsity.

    Args:
        plan: The run.
        saliency: Name of a matrix -> quantiles of its saliencies.
    """
    rules = plan.options.parsed_rules
    every = [m for block in plan.layout.blocks for m in block.matrices]
    free = [m for m in every if not rules.speak_of(m.name)]
    if not free:
        return {}
    pattern, weights = parse_pattern(plan.options.sparsity), [m.elements for m in free]
    quantiles = torch.stack([saliency[m.name] for m in free])
    sparsities = spread_by_saliency(quantiles, weights, pattern.sparsity)
    claims = [Fraction(s) * n for s, n in zip(sparsities, weights, strict=True)]
    zeros = apportion(pattern.count(sum(weights)), claims)
    return {m.name: count for m, count in zip(free, zeros, strict=True)}


def check_total(plan: Plan, total: int, blocks: Iterable[BlockRecord]) -> None:
    """Check that the output has at least as many zeros as requested.

    Raises:
        TargetMissedError: It has fewer.
    """
    zeros = sum(block.zeros for block in blocks)
    if zeros < total:
        raise TargetMissedError(
            f"{zeros} of {plan.layout.prunable} weights are zero in the whole model, "
            f"not {total}.",
            "This is a bug in Halve; report it with the name of the model.",
        )
