"""Any causal language model of transformers, with no forward code of our own."""

from halve.models.matrices import Matrix, is_plain, prunable_matrices
from halve.models.names import Stored, expected_tensors, match_names, renamer
from halve.models.replay import Call, Recording, finish, record
from halve.models.skeleton import (
    Skeleton,
    build_skeleton,
    load_config,
    longest_sequence,
)

__all__ = [
    "Call",
    "Matrix",
    "Recording",
    "Skeleton",
    "Stored",
    "build_skeleton",
    "expected_tensors",
    "finish",
    "is_plain",
    "load_config",
    "longest_sequence",
    "match_names",
    "prunable_matrices",
    "record",
    "renamer",
]
