"""Whether a matrix is stored dense or packed, and in which format: the smallest."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from halve.formats.interface import Format, PackedMatrix, split
from halve.formats.registry import written_formats
from halve.formats.stack import slice_name
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
    for packed in _packings(weight, transposed, quant_params):
        if packed.nbytes < weight.nbytes:
            return split(name, packed)
    return {name: weight}


def store_stack(
    name: str,
    stack: Tensor,
    transposed: bool,
    quant_params: Sequence[QuantParams | None],
) -> dict[str, Tensor]:
    """Return the tensors that a file holds for a stack of matrices.

    Each slice is packed, if that makes the stack smaller; else the stack is dense.

    Args:
        name: Name of the parameter.
        stack: Dense tensor as a checkpoint stores it, [slices, ...].
        transposed: Whether a slice is [columns, rows].
        quant_params: Grid on which the values of each slice lie, if any.
    """
    packed = [
        next(_packings(weight, transposed, params), None)
        for weight, params in zip(stack, quant_params, strict=True)
    ]
    slices = [matrix for matrix in packed if matrix is not None]
    size = sum(matrix.nbytes for matrix in slices)
    if len(slices) < len(stack) or size >= stack.nbytes:
        return {name: stack}
    stored: dict[str, Tensor] = {}
    for index, matrix in enumerate(slices):
        stored |= split(slice_name(name, index), matrix)
    return stored


def _packings(
    weight: Tensor, transposed: bool, quant_params: QuantParams | None
) -> Iterator[PackedMatrix]:
    """Yield a matrix in each format that can hold it, that of the fewest bytes first.

    Sizes are computed before anything is packed, which is slow.
    """
    if not weight.numel():
        return
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
        if packed is not None:
            yield packed


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
