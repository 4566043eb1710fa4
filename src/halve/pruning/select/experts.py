"""Which experts of a block are kept: scores of experts, and the best of them."""

from collections.abc import Callable

from torch import Tensor

from halve.pruning.observe.expert_outputs import ExpertSums

# A score of each expert, [experts]; the highest are kept.
Saliency = Callable[[ExpertSums], Tensor]


def reap(sums: ExpertSums) -> Tensor:
    """Return the mean over an expert's tokens of g ||f(x)||; 0 without any token.

    Source:
        Lasby et al., "REAP the Experts", 2025 (arXiv 2510.13999). g is what the output
        is multiplied by: normalized over the top k where the model does so.
    """
    return sums.weighted / sums.tokens.clamp(min=1)


def mean_norm(sums: ExpertSums) -> Tensor:
    """Return the mean over an expert's tokens of ||f(x)||; 0 without any token.

    As REAP, without the router's weight: an expert that is sent few tokens with large
    outputs counts as much as one that is trusted more.
    """
    return sums.norms / sums.tokens.clamp(min=1)


# Name in records -> score. Each block takes the one with the lower held-out error.
SALIENCIES: dict[str, Saliency] = {"reap": reap, "mean norm": mean_norm}


def keep_best(scores: Tensor, kept: int, groups: int = 1) -> tuple[int, ...]:
    """Return the experts with the highest scores, ascending.

    Args:
        scores: [experts].
        kept: How many are kept; a multiple of `groups`.
        groups: Of so many groups of consecutive experts each keeps as many.
    """
    each = kept // groups
    # Stable, so that of equal scores the first is kept, on any machine.
    order = scores.view(groups, -1).argsort(dim=1, descending=True, stable=True)
    best = order[:, :each].sort(dim=1).values
    size = len(scores) // groups
    return tuple(
        group * size + int(number) for group, row in enumerate(best) for number in row
    )
