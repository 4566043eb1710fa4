"""Launches of the kernels for bitmask matrices, on any number of vectors.

Everything here may be captured in a CUDA graph once a shape has been multiplied, which
compiles its kernels: no synchronization, and no choice or size that depends on data.
Operands must be consistent and checked (`BitmaskMatrix.check`); the kernels trust them.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from halve.runtime.cuda import few, launch
from halve.runtime.cuda.bitmask_kernels import unpack_kernel, vectors_kernel
from halve.runtime.cuda.side_index import SLACK, with_slack

# Whether kernels run in Triton's interpreter, on tensors of the CPU.
INTERPRETED = not isinstance(vectors_kernel, triton.JITFunction)
_LANES = 32


class Bitmask(NamedTuple):
    """A bitmask matrix as the kernels take it.

    Attributes:
        values: [kept], followed in its storage by `SLACK` more.
        mask: [rows, words], uint64.
        offsets: [rows + 1], uint32 or uint64.
        starts: [rows, words], as `side_index.word_starts` returns them.
        columns: Columns of the matrix.
        tile_kept: As `side_index.tile_kept` returns it.
    """

    values: Tensor
    mask: Tensor
    offsets: Tensor
    starts: Tensor
    columns: int
    tile_kept: int

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.mask.shape[0]

    @property
    def suits_few(self) -> bool:
        """Whether the kernel for batches takes the matrix."""
        values = with_slack(self.values)
        return few.can_multiply(values, self.columns, self.tile_kept)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, mask, offsets and starts, as the kernels may read them."""
        # An empty tensor has no address, and lanes read values even where none is kept.
        values = self.values if self.values.numel() else self.values.new_zeros(SLACK)
        return with_slack(values), self.mask, self.offsets, self.starts


def multiply(x: Tensor, matrix: Bitmask, bias: Tensor | None = None) -> Tensor:
    """Return `x @ W.T + bias`, [..., rows], by the kernel that suits the batch.

    Args:
        x: [..., columns], of the dtype of the values, with any strides.
        matrix: W.
        bias: [rows], of the same dtype.
    """
    y = x.new_empty(*x.shape[:-1], matrix.rows)
    vectors = x.reshape(-1, matrix.columns).contiguous()
    results = y.view(-1, matrix.rows)
    batch = vectors.shape[0]
    with on_device(x):
        if batch == 0:
            pass
        elif few.runs(x.device, x.dtype, batch) and matrix.suits_few:
            few.multiply_few(vectors, matrix.operands, matrix.tile_kept, bias, results)
        elif batch <= launch.PACKED_BATCH:
            multiply_packed(vectors, matrix, bias, results)
        else:
            multiply_unpacked(vectors, matrix, bias, results)
    return y


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's device the current one, on which Triton launches kernels."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def launch_kernel(
    kernel: Any,  # noqa: ANN401  (Triton's types do not show how it is called)
    programs: int,
    *arguments: Tensor | int,
    **constants: int,
) -> None:
    """Launch programs of a kernel on the current device and stream."""
    kernel[(programs,)](*arguments, **constants)


def multiply_packed(  # noqa: PLR0913
    x: Tensor,
    matrix: Bitmask,
    bias: Tensor | None,
    y: Tensor,
    *,
    rows: int = launch.PACKED_ROWS,
    warps: int | None = None,
    unroll: int | None = None,
    inline: bool = not INTERPRETED,
) -> None:
    """Write x W.T + bias into y, for a few vectors, without unpacking W.

    Args:
        x: [batch, columns], contiguous.
        matrix: W.
        bias: [rows], or None.
        y: [batch, rows], contiguous.
        rows: Rows a program, a power of two.
        warps: Warps a program, likewise, instead of what `launch` chooses.
        unroll: Steps along a row that load their words at once, likewise.
        inline: Whether columns are decoded by inline PTX.
    """
    warps = warps or launch.warps_of(matrix.columns)
    unroll = unroll or launch.unroll_of(matrix.columns, warps)
    launch_kernel(
        vectors_kernel,
        -(-matrix.rows // rows),
        *(x, *matrix.operands, x if bias is None else bias, y, matrix.rows),
        BATCH=x.shape[0],
        COLUMNS=matrix.columns,
        LANES=_LANES * warps,
        ROWS=rows,
        UNROLL=unroll,
        WHOLE=matrix.rows % rows == 0,
        BIASED=bias is not None,
        INLINE=inline,
        num_warps=warps,
    )


def multiply_unpacked(
    x: Tensor, matrix: Bitmask, bias: Tensor | None, y: Tensor
) -> None:
    """Write x W.T + bias into y, [batch, rows], by torch's product.

    W is unpacked strip by strip into one scratch.
    """
    height = launch.strip_rows(matrix.rows, matrix.columns, x.element_size())
    scratch = x.new_empty(height, matrix.columns)
    for begin in range(0, matrix.rows, height):
        end = min(begin + height, matrix.rows)
        weight = scratch[: end - begin]
        unpack_rows(matrix, slice(begin, end), weight)
        part = None if bias is None else bias[begin:end]
        linear_into(y[:, begin:end], x, weight, part)


def linear_into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write `x @ weight.T + bias` into y, a view of some columns of the result."""
    if bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)


def unpack_rows(
    matrix: Bitmask, rows: slice, dense: Tensor, *, inline: bool = not INTERPRETED
) -> None:
    """Write some rows of W into `dense`, [rows, columns], bit for bit."""
    tiles = -(-matrix.columns // launch.WARP_COLUMNS)
    steps = -(-(rows.stop - rows.start) // launch.UNPACK_ROWS)
    launch_kernel(
        unpack_kernel,
        steps * tiles,
        *(*matrix.operands, dense, rows.start, rows.stop),
        COLUMNS=matrix.columns,
        LANES=_LANES,
        ROWS=launch.UNPACK_ROWS,
        INLINE=inline,
        num_warps=launch.UNPACK_WARPS,
    )


def unpack(matrix: Bitmask) -> Tensor:
    """Return W, dense, [rows, columns]."""
    dense = matrix.values.new_empty(matrix.rows, matrix.columns)
    with on_device(dense):
        unpack_rows(matrix, slice(0, matrix.rows), dense)
    return dense
