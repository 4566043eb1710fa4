"""The main job: prune a model block by block into a new folder."""

from halve.pruning.costs import Costs, estimate_costs
from halve.pruning.duration import estimate_seconds
from halve.pruning.job import prune_model
from halve.pruning.room import Room, make_room
from halve.pruning.run import Execution

__all__ = [
    "Costs",
    "Execution",
    "Room",
    "estimate_costs",
    "estimate_seconds",
    "make_room",
    "prune_model",
]
