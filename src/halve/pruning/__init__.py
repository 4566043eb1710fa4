"""Prune a model, block by block, into a new folder."""

from halve.pruning.dry_run import DryRun, dry_run
from halve.pruning.memory.duration import estimate_seconds
from halve.pruning.memory.forecast import Forecast, forecast_run
from halve.pruning.memory.limit import MemoryPlan, plan_memory
from halve.pruning.prune import prune_model

__all__ = [
    "DryRun",
    "Forecast",
    "MemoryPlan",
    "dry_run",
    "estimate_seconds",
    "forecast_run",
    "plan_memory",
    "prune_model",
]
