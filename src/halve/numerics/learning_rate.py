"""The sizes of Adam's steps where pruned weights are trained.

Adam moves every weight by about the learning rate, whatever its gradient. The rate of a
parameter is a fraction of the root mean square of its nonzero values, so that one
fraction suits all matrices, norms and models.
"""

import math
from collections.abc import Collection, Mapping

from torch import Tensor

# The rate rises over the first tenth of the steps, and ends at a twentieth.
_WARM_UP, _FINAL_RATE = 0.1, 0.05


def parameter_scales(
    values: Mapping[str, Tensor], matrices: Collection[str]
) -> dict[str, float]:
    """Return the root mean square of the nonzero values of each parameter.

    A bias may be all zeros and would never move, so vectors have at least the smallest
    scale of the matrices, or of all parameters where no matrix is trained.

    Args:
        values: Name of a parameter -> its values.
        matrices: Names of the prunable matrices among them.
    """
    scales = {name: _root_mean_square(value) for name, value in values.items()}
    positive = [scales[name] for name in matrices or scales if scales[name]]
    smallest = min(positive, default=0.0)
    return {
        name: scale if name in matrices else max(scale, smallest)
        for name, scale in scales.items()
    }


def rate_factor(done: float) -> float:
    """Return the fraction of the largest rate: linear warm-up, then cosine decay.

    The warm-up is needed because Adam's first steps have full size: its second moment
    has seen one gradient only.

    Args:
        done: Fraction of all steps, that of this step included.
    """
    if done < _WARM_UP:
        return done / _WARM_UP
    angle = math.pi * (done - _WARM_UP) / (1 - _WARM_UP)
    return _FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(angle)) / 2


def _root_mean_square(values: Tensor) -> float:
    """Return the root mean square of the nonzero values; 0 where there are none."""
    nonzero = values[values != 0]
    return float(nonzero.square().mean().sqrt()) if len(nonzero) else 0.0
