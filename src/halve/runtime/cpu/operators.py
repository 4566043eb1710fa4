"""Products with bitmask and dense weights as torch operators.

On the CPU they run Halve's kernels, and those with a side index on CUDA the kernels of
`runtime.cuda`. On other devices, and where there are no kernels, they run the reference
implementation: unpack, then multiply. They are registered with `torch.library`, so that
`torch.compile` sees one opaque node with a known shape.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halve.formats.bitmask import BitmaskMatrix
from halve.runtime.cpu.kernels import kernels, supports
from halve.runtime.cpu.tiles import FUSED_ROWS, linear_by_tiles

# Other modules define their operators in it, too.
library = torch.library.Library("halve", "DEF")
library.define(
    "packed_linear(Tensor x, Tensor values, Tensor mask, Tensor offsets, Tensor? bias, "
    "int columns) -> Tensor"
)
# With parts: values, mask, offsets, and `word_starts` of `runtime.cuda.side_index`.
library.define(
    "packed_linear_indexed(Tensor x, Tensor[] parts, Tensor? bias, int columns, "
    "int tile_kept) -> Tensor"
)
library.define("unpack_indexed(Tensor[] parts, int columns, int tile_kept) -> Tensor")
library.define("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def packed_linear_reference(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    columns: int,
) -> Tensor:
    """Return `x @ W.T + bias`, by unpacking W and multiplying.

    This defines the result of `packed_linear`.

    Args:
        x: [..., columns].
        values: Stored weights, [kept], of the dtype of x.
        mask: [rows, words], uint64.
        offsets: [rows + 1], uint32 or uint64.
        bias: [rows], of the dtype of x.
        columns: Input features.

    Returns:
        [..., rows].
    """
    weight = BitmaskMatrix(values, mask, offsets, columns).unpack()
    return functional.linear(x, weight, bias)


def _packed_linear_cpu(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    columns: int,
) -> Tensor:
    _check_packed_operands(x, values, mask, offsets, bias, columns)
    kernel = kernels() if supports(values.dtype) else None
    if kernel is None:
        return packed_linear_reference(x, values, mask, offsets, bias, columns)
    rows = x.reshape(-1, columns)
    if rows.shape[0] <= most_fused_rows(values.dtype):
        contiguous = rows.contiguous()
        y = kernel.packed_linear(contiguous, values, mask, offsets, bias, columns)
    else:
        y = linear_by_tiles(
            *(rows, mask.shape[0], bias),
            lambda part, out: kernel.unpack(values, mask, offsets, part, out),
        )
    return y.view(*x.shape[:-1], mask.shape[0])


def most_fused_rows(dtype: torch.dtype) -> int:
    """Return the most rows of input that are multiplied by the packed weights.

    The kernel for bfloat16 keeps up with torch's product for longer than the others.
    """
    kernel = kernels()
    is_fast = kernel is not None and kernel.name == "avx512bf16"
    return 2 * FUSED_ROWS if is_fast and dtype == torch.bfloat16 else FUSED_ROWS


def packed_linear_indexed_reference(
    x: Tensor,
    parts: Sequence[Tensor],
    bias: Tensor | None,
    columns: int,
    tile_kept: int,
) -> Tensor:
    """Return what `packed_linear_reference` does; the side index is not used.

    Args:
        x: [..., columns].
        parts: Values, mask, offsets, and stored values before each mask word.
        bias: [rows], of the dtype of x.
        columns: Input features.
        tile_kept: Most values in a tile, as `runtime.cuda.side_index` counts them.
    """
    values, mask, offsets, _ = parts
    return packed_linear_reference(x, values, mask, offsets, bias, columns)


def _packed_linear_indexed_cuda(
    x: Tensor,
    parts: Sequence[Tensor],
    bias: Tensor | None,
    columns: int,
    tile_kept: int,
) -> Tensor:
    # Imported here because it imports Triton, which is not installed everywhere.
    from halve.runtime.cuda import bitmask_products  # noqa: PLC0415

    values, mask, offsets, starts = parts
    _check_packed_operands(x, values, mask, offsets, bias, columns)
    if starts.shape != mask.shape:
        raise RuntimeError(
            f"starts of {list(starts.shape)} do not fit a mask of {list(mask.shape)}"
        )
    matrix = bitmask_products.Bitmask(values, mask, offsets, starts, columns, tile_kept)
    return bitmask_products.multiply(x, matrix, bias)


def unpack_indexed_reference(
    parts: Sequence[Tensor], columns: int, tile_kept: int
) -> Tensor:
    """Return W, dense, [rows, columns]; the side index is not used."""
    values, mask, offsets, _ = parts
    return BitmaskMatrix(values, mask, offsets, columns).unpack()


def _unpack_indexed_cuda(
    parts: Sequence[Tensor], columns: int, tile_kept: int
) -> Tensor:
    from halve.runtime.cuda import bitmask_products  # noqa: PLC0415

    values, mask, offsets, starts = parts
    matrix = bitmask_products.Bitmask(values, mask, offsets, starts, columns, tile_kept)
    return bitmask_products.unpack(matrix)


def _dense_linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = weight.shape
    _check_operands(x, weight, bias, (rows, columns))
    kernel = kernels() if supports(weight.dtype) and weight.is_contiguous() else None
    if kernel is None:
        return functional.linear(x, weight, bias)
    inputs = x.reshape(-1, columns).contiguous()
    return kernel.dense_linear(inputs, weight, bias).view(*x.shape[:-1], rows)


def _check_packed_operands(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    columns: int,
) -> None:
    """Raise RuntimeError on operands of a packed product that do not fit together."""
    _check_operands(x, values, bias, (mask.shape[0], columns))
    if offsets.numel() != mask.shape[0] + 1 or 64 * mask.shape[1] < columns:
        raise RuntimeError(
            f"{offsets.numel()} offsets and a mask of {list(mask.shape)} do not fit "
            f"{columns} columns"
        )


def _check_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, int]
) -> None:
    """Raise RuntimeError, as torch does, on operands that do not fit together.

    The kernels, which take pointers, would read past their ends.
    """
    rows, columns = shape
    dtypes = {x.dtype, weight.dtype} | ({bias.dtype} if bias is not None else set())
    if len(dtypes) > 1:
        raise RuntimeError(
            f"inputs of {x.dtype} cannot be multiplied by weights of {weight.dtype}"
            + (f" with a bias of {bias.dtype}" if bias is not None else "")
        )
    if x.shape[-1] != columns or (bias is not None and bias.shape != (rows,)):
        raise RuntimeError(
            f"inputs of {list(x.shape)} and a bias of "
            f"{None if bias is None else list(bias.shape)} do not fit weights of "
            f"{list(shape)}"
        )


def _packed_linear_fake(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    columns: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], mask.shape[0])


def _packed_linear_indexed_fake(
    x: Tensor,
    parts: Sequence[Tensor],
    bias: Tensor | None,
    columns: int,
    tile_kept: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], parts[1].shape[0])


def _unpack_indexed_fake(
    parts: Sequence[Tensor], columns: int, tile_kept: int
) -> Tensor:
    return parts[0].new_empty(parts[1].shape[0], columns)


def _dense_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# Operator -> its reference, its implementations by device, and its shape.
_IMPLEMENTATIONS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "packed_linear": (
        packed_linear_reference,
        {"CPU": _packed_linear_cpu},
        _packed_linear_fake,
    ),
    "packed_linear_indexed": (
        packed_linear_indexed_reference,
        {"CUDA": _packed_linear_indexed_cuda},
        _packed_linear_indexed_fake,
    ),
    "unpack_indexed": (
        unpack_indexed_reference,
        {"CUDA": _unpack_indexed_cuda},
        _unpack_indexed_fake,
    ),
    "dense_linear": (
        functional.linear,
        {"CPU": _dense_linear_cpu},
        _dense_linear_fake,
    ),
}
for _name, (_reference, _by_device, _fake) in _IMPLEMENTATIONS.items():
    library.impl(_name, _reference, "CompositeExplicitAutograd")
    for _key, _function in _by_device.items():
        library.impl(_name, _function, _key)
    torch.library.register_fake(f"halve::{_name}", _fake, lib=library)

packed_linear = torch.ops.halve.packed_linear.default
packed_linear_indexed = torch.ops.halve.packed_linear_indexed.default
unpack_indexed = torch.ops.halve.unpack_indexed.default
dense_linear = torch.ops.halve.dense_linear.default
