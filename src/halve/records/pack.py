"""The record of packing or unpacking a model."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from halve.records.halve_json import HalveJson
from halve.records.version import RECORD_FORMAT


@dataclass(frozen=True)
class MatrixStorage:
    """How one matrix is stored.

    Attributes:
        tensor: Name of the tensor in the checkpoint.
        rows: Number of output features.
        columns: Number of input features.
        sparsity: Fraction of zeros.
        minus_zeros: Number of negative zeros. Packing stores them like nonzero
            weights, to keep their bits.
        dense_bytes: Size of the dense matrix.
        stored_bytes: Size in the file.
        packed: Whether it is stored packed; a matrix that packing would not make
            smaller stays dense.
        pattern: The tightest sparsity pattern that the matrix obeys.
        grid: Quantization grid on which all its values lie, if the record of the input
            names one.
    """

    tensor: str
    rows: int
    columns: int
    sparsity: float
    minus_zeros: int
    dense_bytes: int
    stored_bytes: int
    packed: bool
    pattern: str = ""
    grid: dict[str, Any] | None = None


@dataclass(frozen=True)
class PackRecord(HalveJson):
    """The record of a packed or unpacked model: the contents of its `halve.json`.

    Attributes:
        kind: `pack` or `unpack`.
        versions: Versions of Halve, torch and transformers.
        identity: What determines the output: the command, the version of the packed
            format, and digests of the input.
        matrices: Every prunable matrix.
        shards: File name -> SHA-256.
        source: The fields of the input's `halve.json`; None where it has none.
        seconds: Wall time of the run that completed the output.
        finished: When it did, ISO 8601, UTC.
        format: Version of the record's layout; see `RECORD_FORMAT`.
        files: Every other file except `halve.json` -> SHA-256.
        heads: Embedding and output head, where the input's record names their grids.
    """

    kind: str
    versions: dict[str, str]
    identity: dict[str, Any]
    matrices: tuple[MatrixStorage, ...]
    shards: dict[str, str]
    source: dict[str, Any] | None
    seconds: float
    finished: str
    format: int = RECORD_FORMAT
    files: dict[str, str] = field(default_factory=dict)
    heads: tuple[MatrixStorage, ...] = ()

    @property
    def all_matrices(self) -> tuple[MatrixStorage, ...]:
        """Every prunable matrix, under the name that PruneRecord uses."""
        return self.matrices

    @property
    def dense_bytes(self) -> int:
        """Size of all prunable matrices when dense."""
        return sum(matrix.dense_bytes for matrix in self.matrices)

    @property
    def stored_bytes(self) -> int:
        """Size of all prunable matrices in the files."""
        return sum(matrix.stored_bytes for matrix in self.matrices)

    def __repr__(self) -> str:
        """Return a line: the fields of all matrices are thousands of characters."""
        packed = sum(matrix.packed for matrix in self.matrices)
        return (
            f"PackRecord({self.kind}: {packed} of {len(self.matrices)} matrices "
            f"packed, {self.stored_bytes:,} of {self.dense_bytes:,} bytes)"
        )

    def _check(self) -> None:
        if not self.dense_bytes or not isfinite(self.seconds):
            raise ValueError("there are no weights, or the time is not finite")
