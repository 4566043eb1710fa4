"""Recovery: the weights that pruning kept learn the dense model's predictions."""

from halve.recovery.recover import recover_model

__all__ = ["recover_model"]
