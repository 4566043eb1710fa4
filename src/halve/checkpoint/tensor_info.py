"""What the headers of a checkpoint say about one tensor."""

from dataclasses import dataclass
from math import prod

import torch

from halve.formats import FORMATS, STACK, Found, slice_name


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its header describes it.

    Attributes:
        name: Name in the checkpoint.
        shard: File that holds it, a bare name inside the checkpoint's folder.
        shape: Shape of the dense tensor.
        dtype: Dtype of the dense tensor.
        found: What is known of a packed or quantized matrix from the headers; None for
            a dense tensor.
        parts: Headers of the tensors that make up such a matrix, in the order of
            `found.parts`; empty for a dense tensor.
        label: How it is stored, for a table; see `StoredMatrix.label`.
    """

    name: str
    shard: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    found: Found | None = None
    parts: tuple["TensorInfo", ...] = ()
    label: str = "dense"

    @property
    def format(self) -> str | None:
        """Name of the format it is stored in; None for a dense tensor."""
        return None if self.found is None else self.found.reader.name

    @property
    def is_packed(self) -> bool:
        """Whether it is stored in a format that Halve writes."""
        return self.format in FORMATS or self.format == STACK.name

    @property
    def stored(self) -> tuple["TensorInfo", ...]:
        """Headers of the tensors in the files that make it up: itself if dense."""
        return self.parts if self.found else (self,)

    @property
    def elements(self) -> int:
        """Number of elements of the dense tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the dense tensor in bytes."""
        return self.elements * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Size of its data in the files, in bytes."""
        return sum(part.nbytes for part in self.stored)

    def slice_bytes(self, index: int | None) -> int:
        """Return the size in the files of a slice, or of all where it is None."""
        if index is None:
            return self.stored_bytes
        if self.format != STACK.name:
            return self.stored_bytes // self.shape[0]
        name = slice_name(self.name, index)
        return sum(p.nbytes for p in self.parts if p.name.startswith(name))
