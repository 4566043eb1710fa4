"""AdamW without weight decay, whose steps are in proportion to each parameter.

The step of a parameter is a fraction of the root mean square of its nonzero values, so
that one learning rate suits all matrices, norms and models. Weight decay would pull
weights towards zero, which the dense model's predictions do not ask for.
"""

import math

import torch
from torch import Tensor

from halve.recovery.student import Student

_BETAS = (0.9, 0.95)
# The rate rises over the first tenth of the steps, and ends at a twentieth.
_WARM_UP, _FINAL_RATE = 0.1, 0.05


def make_optimizer(student: Student, rate: float) -> torch.optim.AdamW:
    """Return the optimizer of a student's parameters.

    Args:
        student: The model; its values set the scale of each parameter's steps.
        rate: Largest step, as a fraction of that scale.
    """
    scales = {n: _root_mean_square(p.data) for n, p in student.parameters.items()}
    # A bias may be all zeros and would never move.
    smallest = min((scales[name] for name in student.zeros), default=1.0)
    groups = [
        {
            "params": [parameter],
            "lr": 0.0,
            "peak": rate
            * (scales[n] if n in student.zeros else max(scales[n], smallest)),
        }
        for n, parameter in student.parameters.items()
    ]
    return torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0)


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Set the learning rates of a step, counted from 0, of so many."""
    factor = rate_factor((step + 1) / steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def rate_factor(done: float) -> float:
    """Return the fraction of the largest rate: linear warm-up, then cosine decay.

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
