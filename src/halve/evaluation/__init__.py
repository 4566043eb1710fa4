"""How well a model predicts text, alone or against another."""

from halve.evaluation.perplexity import Judging, compare, judge

__all__ = ["Judging", "compare", "judge"]
