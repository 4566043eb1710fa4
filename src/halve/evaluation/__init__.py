"""Evaluation: a model's perplexity, and its divergence from a reference model."""

from halve.evaluation.perplexity import compare, evaluate

__all__ = ["compare", "evaluate"]
