"""Lazy in, atomic out: the files of a model."""

from halve.checkpoint.files import sha256
from halve.checkpoint.output import (
    RECORD,
    check_space,
    is_finished,
    output_path,
    read_record,
    recall,
)
from halve.checkpoint.reader import Checkpoint, TensorInfo, is_bare
from halve.checkpoint.source import locate
from halve.checkpoint.workspace import Workspace, open_workspace

__all__ = [
    "RECORD",
    "Checkpoint",
    "TensorInfo",
    "Workspace",
    "check_space",
    "is_bare",
    "is_finished",
    "locate",
    "open_workspace",
    "output_path",
    "read_record",
    "recall",
    "sha256",
]
