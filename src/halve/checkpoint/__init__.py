"""Lazy in, atomic out: the files of a model."""

from halve.checkpoint.reader import Checkpoint, TensorInfo
from halve.checkpoint.source import locate

__all__ = ["Checkpoint", "TensorInfo", "locate"]
