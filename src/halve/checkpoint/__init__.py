"""Read and write the files of a model: tensors lazily, outputs atomically."""

from halve.checkpoint.checkpoint import Checkpoint
from halve.checkpoint.index import has_no_weights
from halve.checkpoint.output import (
    check_space,
    is_finished,
    output_path,
    parse_note,
    read_record,
    source_record,
)
from halve.checkpoint.selected_view import SelectedCheckpoint, Selection
from halve.checkpoint.side_files import find_side_files
from halve.checkpoint.source import resolve_model
from halve.checkpoint.tensor_info import TensorInfo
from halve.checkpoint.workspace import Workspace, open_workspace
from halve.records.stored import MEASUREMENTS, RECORD, sha256

__all__ = [
    "MEASUREMENTS",
    "RECORD",
    "Checkpoint",
    "SelectedCheckpoint",
    "Selection",
    "TensorInfo",
    "Workspace",
    "check_space",
    "find_side_files",
    "has_no_weights",
    "is_finished",
    "open_workspace",
    "output_path",
    "parse_note",
    "read_record",
    "resolve_model",
    "sha256",
    "source_record",
]
