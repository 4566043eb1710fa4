"""Lazy in, atomic out: the files of a model."""

from halve.checkpoint.checkpoint import Checkpoint
from halve.checkpoint.files import sha256
from halve.checkpoint.index import has_no_weights
from halve.checkpoint.output import (
    RECORD,
    check_space,
    is_finished,
    output_path,
    parse_note,
    read_record,
)
from halve.checkpoint.source import locate
from halve.checkpoint.tensor_info import TensorInfo
from halve.checkpoint.workspace import Workspace, open_workspace

__all__ = [
    "RECORD",
    "Checkpoint",
    "TensorInfo",
    "Workspace",
    "check_space",
    "has_no_weights",
    "is_finished",
    "locate",
    "open_workspace",
    "output_path",
    "parse_note",
    "read_record",
    "sha256",
]
