"""Whether a matrix is stored dense or packed: whichever takes fewer bytes."""

import torch
from torch import Tensor

from halve.formats.interface import split
from halve.formats.registry import written_format


def store(name: str, weight: Tensor, transposed: bool = False) -> dict[str, Tensor]:
    """Return the tensors that a file holds for a matrix, packed if that is smaller.

    Args:
        name: Name of the parameter.
        weight: Dense tensor as a checkpoint stores it, of any dtype.
        transposed: Whether that is [columns, rows].
    """
    writer = written_format()
    if not writer.supports(weight.dtype) or not weight.numel():
        return {name: weight}
    packed = writer.pack(weight, transposed)
    return split(name, packed) if packed.nbytes < weight.nbytes else {name: weight}


def packed_size(weight: Tensor) -> int | None:
    """Return the bytes that a [rows, columns] matrix takes packed, without packing it.

    None if matrices of its dtype are not packed.
    """
    writer = written_format()
    if not writer.supports(weight.dtype):
        return None
    rows, columns = weight.shape
    return writer.nbytes(rows, columns, writer.count_kept(weight), weight.dtype)


def would_shrink(rows: int, columns: int, kept: int, dtype: torch.dtype) -> bool:
    """Whether a matrix with so many nonzero weights is smaller packed than dense."""
    writer, dense = written_format(), rows * columns * dtype.itemsize
    return writer.supports(dtype) and writer.nbytes(rows, columns, kept, dtype) < dense
