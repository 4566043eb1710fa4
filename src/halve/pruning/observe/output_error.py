"""Errors of a block's outputs: of all tokens together, and of each by its own size.

In some models single tokens are hundreds of times larger than the rest (Sun et al.,
"Massive activations", 2024): sums of squares over tokens then say how well those are
reproduced, and nothing of the others.
"""

from dataclasses import dataclass

from torch import Tensor

# A token counts as no smaller than this fraction of the mean of ||Y_t||^2, so that one
# which is nearly zero does not count for all.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class OutputDeviation:
    """How outputs Y' differ from Y, one token in each row.

    Attributes:
        overall: ||Y - Y'|| / ||Y||.
        by_token: Root mean square over tokens t of ||Y_t - Y'_t|| / ||Y_t||.
    """

    overall: float
    by_token: float

    @classmethod
    def of(cls, outputs: Tensor, targets: Tensor) -> "OutputDeviation":
        """Compare outputs Y' with targets Y, [..., width] each."""
        lost, size = (outputs - targets).norm(), targets.norm()
        overall = float(lost / size) if size else float(lost > 0)
        by_token = relative_squares(outputs, targets).mean().sqrt()
        return cls(overall, float(by_token))


def relative_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return ||Y_t - Y'_t||^2 / ||Y_t||^2 for each token t.

    Args:
        outputs: Y', [..., width].
        targets: Y, in the same shape.

    Returns:
        [...]; differentiable in the outputs. A token of nearly zeros counts as larger
        than it is; where all are zero, so is the result.
    """
    return (outputs - targets).square().sum(-1) / token_squares(targets)


def token_squares(targets: Tensor) -> Tensor:
    """Return ||Y_t||^2 for each token t of [..., width], [...].

    A token of nearly zeros counts as larger than it is, so that it can be divided by.
    """
    sizes = targets.square().sum(-1)
    return sizes.clamp(min=(_SMALLEST * sizes.mean()).clamp_min(1e-30))
