"""What a model is, measured rather than believed."""

from halve.measure.inspection import inspect_model

__all__ = ["inspect_model"]
