"""How well a model predicts text, alone or against another."""

from halve.evaluation.perplexity import compare, evaluate

__all__ = ["compare", "evaluate"]
