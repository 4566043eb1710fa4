"""Evaluation: a model's perplexity, and its divergence from a reference model."""

from halve.evaluation.passage import Passage, compare_passage
from halve.evaluation.perplexity import (
    MODEL,
    REFERENCE,
    check_text,
    compare,
    evaluate,
    evaluation_segments,
)

__all__ = [
    "MODEL",
    "REFERENCE",
    "Passage",
    "check_text",
    "compare",
    "compare_passage",
    "evaluate",
    "evaluation_segments",
]
