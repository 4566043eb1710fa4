"""The main job: prune a model block by block into a new folder."""

from halve.pruning.costs import (
    Costs,
    activation_budget,
    estimate_costs,
    estimate_seconds,
)
from halve.pruning.job import prune_model
from halve.pruning.run import Execution

__all__ = [
    "Costs",
    "Execution",
    "activation_budget",
    "estimate_costs",
    "estimate_seconds",
    "prune_model",
]
