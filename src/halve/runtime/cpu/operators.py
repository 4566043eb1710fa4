"""Products with bitmask and dense weights as torch operators.

On the CPU they run Halve's kernels. On other devices, and where there are no kernels,
they run the reference implementation: unpack, then multiply. They are registered with
`torch.library`, so that `torch.compile` sees one opaque node with a known shape.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from halve.formats.bitmask import BitmaskMatrix
from halve.numerics import matmul
from halve.runtime.cpu.kernels import kernels, supports

# Up to this many rows of input the kernel multiplies by the packed weights. Above, they
# are unpacked tile by tile for torch's own product, which is then faster.
FUSED_ROWS = 48
# Approximate size of a tile of unpacked rows, small enough to stay in the cache.
_TILE_BYTES = 2**21
# The height of a tile is a multiple of this: others cost the product a tenth of its
# speed.
_TILE_ROWS = 256

_library = torch.library.Library("halve", "DEF")
_library.define(
    "packed_linear(Tensor x, Tensor values, Tensor mask, Tensor offsets, Tensor? bias, "
    "int columns) -> Tensor"
)
_library.define("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


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
        y = x.new_empty(rows.shape[0], mask.shape[0])
        for part, weight in _tiles(values, mask, offsets, columns):
            _multiply_into(
                y[:, part], rows, weight, None if bias is None else bias[part]
            )
    return y.view(*x.shape[:-1], mask.shape[0])


def _tiles(
    values: Tensor, mask: Tensor, offsets: Tensor, columns: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield tiles of a matrix: which rows, and those rows unpacked.

    All tiles share one memory, so each overwrites the one before.
    """
    kernel = kernels()
    assert kernel is not None
    rows = mask.shape[0]
    fit = _TILE_BYTES // (columns * values.element_size())
    height = min(max(fit // _TILE_ROWS, 1) * _TILE_ROWS, rows)
    tile = _scratch.tile(height, columns, values.dtype)
    for start in range(0, rows, height):
        part = slice(start, min(start + height, rows))
        weight = tile[: part.stop - start]
        kernel.unpack(values, mask, offsets, part, weight)
        yield part, weight


class _Scratch(threading.local):
    """Reused memory for a tile, one for each thread.

    New memory would cost a page fault every 4 KB.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def tile(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return a [rows, columns] tensor with undefined contents."""
        size = rows * columns * dtype.itemsize
        if self.memory.numel() < size:
            self.memory = torch.empty(size, dtype=torch.uint8)
        return self.memory[:size].view(dtype).view(rows, columns)


_scratch = _Scratch()


def _multiply_into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write `x @ weight.T + bias` into y, a view of some columns of the result."""
    if x.dtype == torch.float32:
        # By oneDNN, which is twice as fast as torch's default on AMD.
        y.copy_(matmul.linear(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)


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


_library.impl("packed_linear", packed_linear_reference, "CompositeExplicitAutograd")
_library.impl("packed_linear", _packed_linear_cpu, "CPU")
_library.impl("dense_linear", functional.linear, "CompositeExplicitAutograd")
_library.impl("dense_linear", _dense_linear_cpu, "CPU")
torch.library.register_fake("halve::packed_linear", _packed_linear_fake, lib=_library)
torch.library.register_fake("halve::dense_linear", _dense_linear_fake, lib=_library)

packed_linear = torch.ops.halve.packed_linear.default
dense_linear = torch.ops.halve.dense_linear.default
