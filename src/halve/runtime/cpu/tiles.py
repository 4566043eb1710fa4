"""Products with many vectors: a packed matrix is unpacked tile by tile for torch."""

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from halve.numerics import matmul

# Up to this many rows of input the kernels multiply by the packed weights. Above, they
# are unpacked tile by tile for torch's own product, which is then faster.
FUSED_ROWS = 48
# Approximate size of a tile of unpacked rows, small enough to stay in the cache.
_TILE_BYTES = 2**21
# The height of a tile is a multiple of this: others cost the product a tenth of its
# speed.
_TILE_ROWS = 256

# Writes some rows of a matrix, dense, into a tensor.
Unpack = Callable[[slice, Tensor], None]


def linear_by_tiles(
    x: Tensor, rows: int, bias: Tensor | None, unpack: Unpack
) -> Tensor:
    """Return `x @ W.T + bias`, [batch, rows], for a packed W.

    Args:
        x: [batch, columns].
        rows: Rows of W.
        bias: [rows], of the dtype of x.
        unpack: Unpacks rows of W into a tensor of the dtype of x.
    """
    y = x.new_empty(x.shape[0], rows)
    for part, weight in _tiles(rows, x.shape[1], x.dtype, unpack):
        _multiply_into(y[:, part], x, weight, None if bias is None else bias[part])
    return y


def _tiles(
    rows: int, columns: int, dtype: torch.dtype, unpack: Unpack
) -> Iterator[tuple[slice, Tensor]]:
    """Yield tiles of a matrix: which rows, and those rows unpacked.

    All tiles share one memory, so each overwrites the one before.
    """
    fit = _TILE_BYTES // (columns * dtype.itemsize)
    height = min(max(fit // _TILE_ROWS, 1) * _TILE_ROWS, rows)
    tile = _scratch.tile(height, columns, dtype)
    for start in range(0, rows, height):
        part = slice(start, min(start + height, rows))
        weight = tile[: part.stop - start]
        unpack(part, weight)
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
