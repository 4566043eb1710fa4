"""Making a pruned checkpoint small, and dense again."""

from halve.packing.rewrite import rewrite_model

__all__ = ["rewrite_model"]
