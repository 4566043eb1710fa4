"""Making a pruned checkpoint small, and dense again."""

from halve.packing.job import Rewriting, rewrite_model

__all__ = ["Rewriting", "rewrite_model"]
