"""Products with bitmask and dense weights as torch operators.

On the CPU they run Halve's kernels. On other devices, and where there are no kernels,
they run the reference implementation: unpack, then multiply. They are registered with
`torch.library`, so that `torch.compile` sees one opaque node with a known shape.
"""

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
    _check_operands(x, values, bias, (mask.shape[0], columns))
    if offsets.numel() != mask.shape[0] + 1 or 64 * mask.shape[1] < columns:
        raise RuntimeError(
            f"{offsets.numel()} offsets and a mask of {list(mask.shape)} do not fit "
            f"{columns} columns"
        )
    kernel = kernels() if supports(values.dtype) else None
    if kernel is None:
        return packed_linear_reference(x, values, mask, offsets, bias, columns)
    rows = x.reshape(-1, columns)
    if rows.shape[0] <= FUSED_ROWS:
        contiguous = rows.contiguous()
        y = kernel.packed_linear(contiguous, values, mask, offsets, bias, columns)
    else:
        y = linear_by_tiles(
            *(rows, mask.shape[0], bias),
            lambda part, out: kernel.unpack(values, mask, offsets, part, out),
        )
    return y.view(*x.shape[:-1], mask.shape[0])


def _dense_linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = weight.shape
    _check_operands(x, weight, bias, (rows, columns))
    kernel = kernels() if supports(weight.dtype) and weight.is_contiguous() else None
    if kernel is None:
        return functional.linear(x, weight, bias)
    inputs = x.reshape(-1, columns).contiguous()
    return kernel.dense_linear(inputs, weight, bias).view(*x.shape[:-1], rows)


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


def _dense_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


library.impl("packed_linear", packed_linear_reference, "CompositeExplicitAutograd")
library.impl("packed_linear", _packed_linear_cpu, "CPU")
library.impl("dense_linear", functional.linear, "CompositeExplicitAutograd")
library.impl("dense_linear", _dense_linear_cpu, "CPU")
torch.library.register_fake("halve::packed_linear", _packed_linear_fake, lib=library)
torch.library.register_fake("halve::dense_linear", _dense_linear_fake, lib=library)

packed_linear = torch.ops.halve.packed_linear.default
dense_linear = torch.ops.halve.dense_linear.default
