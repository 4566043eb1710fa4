"""Whether a matrix is stored dense or packed, and in which format: the smallest."""

import torch
from torch import Tensor

from halve.formats.interface import Format, split
from halve.formats.registry import written_formats
from halve.grids import QuantParams, QuantScheme


def store(
    name: str,
    weight: Tensor,
    transposed: bool = False,
    quant_params: QuantParams | None = None,
) -> dict[str, Tensor]:
    """Return the tensors that a file holds for a matrix, packed if that is smaller.

    Args:
        name: Name of the parameter.
        weight: Dense tensor as a checkpoint stores it, of any dtype.
        transposed: Whether that is [columns, rows].
        quant_params: Grid on which its values lie, of [rows, groups], if any.
    """
    if not weight.numel():
        return {name: weight}
    rows, columns = weight.T.shape if transposed else weight.shape
    scheme = quant_params and quant_params.grid
    sizes: dict[Format, int] = {}
    for writer in written_formats():
        kept = writer.count_kept(weight)
        size = writer.nbytes((rows, columns), kept, weight.dtype, scheme)
        if size is not None:
            sizes[writer] = size
    for writer in sorted(sizes, key=lambda writer: sizes[writer]):
        packed = writer.pack(weight, transposed, quant_params)
        if packed is not None and packed.nbytes < weight.nbytes:
            return split(name, packed)
    return {name: weight}


def packed_size(weight: Tensor, scheme: QuantScheme | None = None) -> int | None:
    """Return the bytes that a [rows, columns] matrix takes packed, without packing it.

    None if matrices of its dtype are not packed. With a mask over codes the result may
    differ from the size by half a byte for each row.
    """
    rows, columns = weight.shape
    sizes = (
        writer.nbytes((rows, columns), writer.count_kept(weight), weight.dtype, scheme)
        for writer in written_formats()
    )
    return min((size for size in sizes if size is not None), default=None)


def would_shrink(
    shape: tuple[int, int],
    kept: int,
    dtype: torch.dtype,
    scheme: QuantScheme | None = None,
) -> bool:
    """Whether a matrix with so many nonzero weights is smaller packed than dense."""
    rows, columns = shape
    sizes = (writer.nbytes(shape, kept, dtype, scheme) for writer in written_formats())
    dense = rows * columns * dtype.itemsize
    return any(size is not None and size < dense for size in sizes)
