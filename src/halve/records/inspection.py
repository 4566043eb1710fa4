"""What `halve inspect` counts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixInspection:
    """One prunable matrix, as stored.

    Attributes:
        tensor: Name of the tensor in the checkpoint.
        rows: Number of output features.
        columns: Number of input features.
        dtype: Name of the dtype of its dense weights, without `torch.`.
        sparsity: Fraction of zeros.
        pattern: `dense`, `unstructured`, or the tightest n:m pattern that it obeys.
        bytes: Size in the file.
        packed: Whether it is stored in one of Halve's packed formats.
        packed_bytes: Size when packed; None for a dtype that cannot be packed.
        storage: `dense`, `bitmask`, bits and group size of packed codes, or the format
            of a quantized or sparse release.
        grid: Bits and group size of the recorded quantization grid, such as
            `int4 g128`, if all values of a dense matrix lie on it; else empty.
        experts: For a matrix of an expert, what is common to those of all experts of
            its block: the name of the tensor with `*` for the expert's number; None for
            other matrices.
    """

    tensor: str
    rows: int
    columns: int
    dtype: str
    sparsity: float
    pattern: str
    bytes: int
    packed: bool
    packed_bytes: int | None
    storage: str
    grid: str = ""
    experts: str | None = None


@dataclass(frozen=True)
class Inspection:
    """The contents of a model, counted in its files.

    Attributes:
        model: Folder or repository, as the caller named it.
        matrices: Every prunable matrix.
        parameters: Number of elements in all tensors.
        zeros: Number of zeros in all tensors.
        bytes: Size of all tensors in the files.
    """

    model: str
    matrices: tuple[MatrixInspection, ...]
    parameters: int
    zeros: int
    bytes: int

    def __repr__(self) -> str:
        """Return a line: the fields of all matrices are thousands of characters."""
        return (
            f"Inspection({self.model}: {100 * self.sparsity:.2f}% zeros in "
            f"{len(self.matrices)} matrices, {self.bytes:,} bytes)"
        )

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all prunable matrices."""
        zeros = sum(m.sparsity * m.rows * m.columns for m in self.matrices)
        return zeros / sum(m.rows * m.columns for m in self.matrices)
