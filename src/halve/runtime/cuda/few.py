"""Products of 2 to 16 vectors with a bitmask matrix, by the kernel in `few.cu`.

The kernel is CUDA C++, because it needs what Triton does not offer: shared memory that
it addresses itself, and the layout of the operands of the mma instruction. Everything
here may be captured in a CUDA graph once a product of the same kind has been made.
"""

from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor

from halve.runtime.cuda.nvrtc import Kernel, compile_source, load_kernel

# Of the kernel: rows and columns of a tile, rows of x of an mma instruction, stages.
_ROWS, COLUMNS, _SAMPLES, _STAGES = 16, 256, 8, 2
# Bytes of a piece that is copied to shared memory at once, and of the table there.
_PIECE, _TABLE = 16, 64
MOST_VECTORS = 2 * _SAMPLES
# Warps of a block: more would not have enough registers.
MAX_WARPS = {1: 20, 2: 16}
# The least compute capability with cp.async and bfloat16.
_CAPABILITY = (8, 0)
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_COLUMNS, _MAX_VALUES = 2**16, 2**32


class Plan(NamedTuple):
    """How a product is divided.

    Attributes:
        grid: Blocks that take tile after tile of rows; blocks that divide the columns.
        warps: Warps of a block, which divide its columns.
        pitch: Bytes of shared memory for the values of a row of a tile.
        shared_memory: Bytes of shared memory of a block.
        n_tiles: Eights of vectors.
    """

    grid: tuple[int, int]
    warps: int
    pitch: int
    shared_memory: int
    n_tiles: int

    @property
    def splits(self) -> int:
        """Parts of the columns whose sums are added afterwards."""
        return self.grid[1]


def most_in_tile(starts: Tensor, offsets: Tensor) -> int:
    """Return the most values that a row has within the columns of a tile.

    Args:
        starts: [rows, words], as `side_index.word_starts` returns them.
        offsets: [rows + 1], uint32 or uint64.

    Cost:
        Waits for the device.
    """
    wide = offsets.to(torch.int64)
    firsts = starts[:, :: COLUMNS // 64].to(torch.int64)
    ends = torch.cat([firsts[:, 1:], (wide[1:] - wide[:-1])[:, None]], dim=1)
    return int((ends - firsts).max()) if firsts.numel() else 0


def can_multiply(values: Tensor, columns: int, most: int) -> bool:
    """Whether the kernel takes a matrix, on whatever device it lies.

    Args:
        values: Its stored values.
        columns: Its columns.
        most: What `most_in_tile` returns.
    """
    return (
        values.dtype in _DTYPES
        and columns % 2 == 0
        and columns <= _MAX_COLUMNS
        and values.numel() < _MAX_VALUES
        and values.data_ptr() % _PIECE == 0
        and most > 0
    )


def divide(
    rows: int, columns: int, batch: int, most: int, gpu: tuple[int, int]
) -> Plan:
    """Choose how to divide a product.

    Args:
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        batch: Vectors, at most `MOST_VECTORS`.
        most: What `most_in_tile` returns.
        gpu: Multiprocessors, and bytes of shared memory that a block may have.
    """
    multiprocessors, available = gpu
    n_tiles = -(-batch // _SAMPLES)
    # A row may begin anywhere in a piece. The pitch is an odd number of pieces, so that
    # neighbouring rows begin in different banks of shared memory.
    pitch = _PIECE * (-(-(2 * most + _PIECE - 2) // _PIECE) | 1)
    sums = _STAGES * _ROWS * _SAMPLES * n_tiles * 4
    of_warp = _STAGES * _ROWS * pitch + sums
    chunks = -(-columns // COLUMNS)
    splits = -(-chunks // min((available - _TABLE) // of_warp, MAX_WARPS[n_tiles]))
    warps = -(-chunks // splits)
    blocks = min(-(-rows // _ROWS), max(multiprocessors // splits, 1))
    shared_memory = _TABLE + warps * of_warp
    return Plan((blocks, splits), warps, pitch, shared_memory, n_tiles)


def multiply_few(
    x: Tensor,
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    most: int,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """Write `x @ W.T + bias` into y, on the current device.

    Args:
        x: [batch, columns], contiguous, 1 to `MOST_VECTORS` rows.
        parts: Values, mask, offsets and starts of W, for which `can_multiply`.
        most: What `most_in_tile` returns.
        bias: [rows], or None.
        y: [batch, rows], contiguous.
    """
    values, mask, offsets, starts = parts
    (batch, columns), rows = x.shape, mask.shape[0]
    plan = divide(rows, columns, batch, most, _gpu(x.device))
    kernel, add = _kernels(x.device, x.dtype, plan.n_tiles)
    sums = None
    if plan.splits > 1:
        sums = x.new_empty(plan.splits, batch, rows, dtype=torch.float32)
    stride = offsets.element_size() // 4
    kernel.launch(
        plan.grid,
        32 * plan.warps,
        [
            *(values, mask, starts, offsets, stride, rows, mask.shape[1], plan.pitch),
            *(x, bias, y, sums, batch, columns),
        ],
        plan.shared_memory,
    )
    if sums is not None:
        threads = 256
        grid = (-(-batch * rows // threads), 1)
        add.launch(grid, threads, [sums, bias, y, plan.splits, batch, rows])


@cache
def _gpu(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


@cache
def _kernels(
    device: torch.device, dtype: torch.dtype, n_tiles: int
) -> tuple[Kernel, Kernel]:
    """Return the kernel and the one that adds the parts, compiled for a device."""
    major, minor = torch.cuda.get_device_capability(device)
    cubin = compile_few(f"sm_{major}{minor}", dtype, n_tiles)
    most = _gpu(device)[1]
    return load_kernel(cubin, "halve_few", most), load_kernel(cubin, "halve_few_sum")


@cache
def compile_few(architecture: str, dtype: torch.dtype, n_tiles: int) -> bytes:
    """Compile the kernels; needs no GPU."""
    source = (files("halve.runtime.cuda") / "few.cu").read_text()
    options = [
        f"-DN_TILES={n_tiles}",
        f"-DHALF={int(dtype == torch.float16)}",
        f"-DMAX_WARPS={MAX_WARPS[n_tiles]}",
    ]
    return compile_source(source, architecture, options)
