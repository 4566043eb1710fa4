"""What the headers of a checkpoint say about one tensor."""

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its header describes it.

    Attributes:
        name: Name in the checkpoint.
        shard: File that holds it, a bare name inside the checkpoint's folder.
        shape: Shape of the dense tensor.
        dtype: Dtype of the dense tensor.
        format: Packed format it is stored in, a key of `halve.formats.FORMATS`; None
            for a dense tensor.
        parts: Headers of the tensors of a packed matrix, in the order of the format's
            suffixes, its own name first; empty for a dense tensor.
        label: How it is stored, for a table; see `PackedMatrix.label`.
    """

    name: str
    shard: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: str | None = None
    parts: tuple["TensorInfo", ...] = ()
    label: str = "dense"

    @property
    def stored(self) -> tuple["TensorInfo", ...]:
        """Headers of the tensors in the files that make it up: itself if dense."""
        return self.parts if self.format else (self,)

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
