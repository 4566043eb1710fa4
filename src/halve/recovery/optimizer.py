"""AdamW without weight decay, whose steps are in proportion to each parameter.

Weight decay would pull weights towards zero, which the dense model's predictions do not
ask for.
"""

import torch

from halve.numerics.learning_rate import parameter_scales, rate_factor
from halve.recovery.student import Student

_BETAS = (0.9, 0.95)


def make_optimizer(student: Student, rate: float) -> torch.optim.AdamW:
    """Return the optimizer of a student's parameters.

    Args:
        student: The model; its values set the scale of each parameter's steps.
        rate: Largest step, as a fraction of that scale.
    """
    values = {name: each.data for name, each in student.parameters.items()}
    scales = parameter_scales(values, student.zeros.keys())
    groups = [
        {"params": [parameter], "lr": 0.0, "peak": rate * scales[name]}
        for name, parameter in student.parameters.items()
    ]
    return torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0)


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Set the learning rates of a step, counted from 0, of so many."""
    factor = rate_factor((step + 1) / steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
