"""Lazy in, atomic out: the files of a model."""

from halve.checkpoint.reader import Checkpoint, TensorInfo, read_shard
from halve.checkpoint.source import locate
from halve.checkpoint.workspace import (
    RECORD,
    Workspace,
    check_free,
    check_identity,
    check_space,
    open_workspace,
    partial_of,
)

__all__ = [
    "RECORD",
    "Checkpoint",
    "TensorInfo",
    "Workspace",
    "check_free",
    "check_identity",
    "check_space",
    "locate",
    "open_workspace",
    "partial_of",
    "read_shard",
]
