"""The main job: prune a model block by block into a new folder."""

from halve.pruning.job import prune_model
from halve.pruning.run import Execution

__all__ = ["Execution", "prune_model"]
