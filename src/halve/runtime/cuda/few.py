"""Products of 2 to 16 vectors with a bitmask matrix, by the kernel in `few.cu`.

The kernel is CUDA C++, because it needs what Triton does not offer: shared memory that
it addresses itself, and the layout of the operands of the mma instruction. Everything
here may be captured in a CUDA graph once a product of the same kind has been made.
"""

import warnings
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor

from halve.errors import HalveWarning
from halve.runtime.cuda.nvrtc import Kernel, compile_source, load_kernel
from halve.runtime.cuda.side_index import TILE_COLUMNS, with_slack, word_starts

# Of the kernel: rows and columns of a tile, rows of x of an mma instruction, stages.
_ROWS, _COLUMNS, _SAMPLES, _STAGES = 16, TILE_COLUMNS, 8, 2
# Bytes of a piece that is copied to shared memory at once, and of the table there.
_PIECE, _TABLE = 16, 64
# Bytes of two numbers, which the kernel loads at once from x.
_PAIR = 4
# Bytes of shared memory that every block takes for itself.
_RESERVED = 1024
MOST_VECTORS = 2 * _SAMPLES
# Warps of a block, by eights of vectors: more would not have enough registers.
MAX_WARPS = {1: 20, 2: 12}
# The least compute capability with cp.async and bfloat16.
_CAPABILITY = (8, 0)
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_COLUMNS, _MAX_VALUES = 2**16, 2**32
# Relative error of a product of 64 small integers: that of rounding the result.
_TOLERANCE = 1e-2


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


def can_multiply(values: Tensor, columns: int, kept: int) -> bool:
    """Whether the kernel takes a matrix, on whatever device it lies.

    Args:
        values: Its stored values.
        columns: Its columns.
        kept: What `side_index.tile_kept` returns.
    """
    return (
        values.dtype in _DTYPES
        and columns % 2 == 0
        and columns <= _MAX_COLUMNS
        and values.numel() < _MAX_VALUES
        and values.data_ptr() % _PIECE == 0
        and kept > 0
    )


def runs(device: torch.device, dtype: torch.dtype, batch: int) -> bool:
    """Whether products of so many vectors run the kernel on a device.

    The first call for a GPU, a dtype and eight vectors more compiles the kernel, which
    takes a second, and tries it on a tiny matrix. If it fails, one HalveWarning says
    so. While a CUDA graph is captured nothing is tried.
    """
    if device.type != "cuda" or not 1 < batch <= MOST_VECTORS or dtype not in _DTYPES:
        return False
    key = device, dtype, _n_tiles(batch)
    if key not in _works and not torch.cuda.is_current_stream_capturing():
        _works[key] = _try(*key)
    return _works.get(key, False)


# Devices, dtypes and eights of vectors for which the kernel has been tried.
_works: dict[tuple[torch.device, torch.dtype, int], bool] = {}


def _try(device: torch.device, dtype: torch.dtype, n_tiles: int) -> bool:
    # Whatever fails in the compiler and the driver has the same remedy.
    try:
        fault = find_fault(device, dtype, n_tiles)
    except Exception as error:  # noqa: BLE001
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if fault is not None:
        warnings.warn(
            f"Halve's kernel for batches cannot run on {device} ({fault}). Packed "
            "matrices are unpacked for them: results are the same, but take longer.",
            HalveWarning,
            stacklevel=2,
        )
    return fault is None


@torch.inference_mode()
def find_fault(device: torch.device, dtype: torch.dtype, n_tiles: int) -> str | None:
    """Run the kernel on a matrix of which every other weight is stored.

    Returns:
        None if the result is right, else what is wrong.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "it needs compute capability 8.0"
    dense = torch.arange(1, 129, dtype=dtype, device=device).view(2, 64).remainder_(7)
    dense.add_(1)[:, ::2] = 0
    mask = torch.tensor([0xAA] * 16, dtype=torch.uint8, device=device)
    mask = mask.view(torch.uint64).view(2, 1)
    offsets = torch.tensor([0, 32, 64], device=device).to(torch.uint32)
    values = with_slack(dense[:, 1::2].flatten().contiguous())
    batch = _SAMPLES * n_tiles
    x = torch.arange(64 * batch, device=device).remainder_(5).to(dtype).view(batch, 64)
    y = x.new_empty(batch, 2)
    multiply_few(x, (values, mask, offsets, word_starts(mask)), 32, None, y)
    wanted = x.double() @ dense.double().T
    right = torch.allclose(y.double(), wanted, rtol=_TOLERANCE)
    return None if right else "it multiplies wrongly"


def divide(
    rows: int, columns: int, batch: int, kept: int, gpu: tuple[int, int]
) -> Plan:
    """Choose how to divide a product.

    Args:
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        batch: Vectors, at most `MOST_VECTORS`.
        kept: What `side_index.tile_kept` returns.
        gpu: Multiprocessors, and bytes of shared memory that a block may have.
    """
    multiprocessors, available = gpu
    n_tiles, chunks = _n_tiles(batch), -(-columns // _COLUMNS)
    row_tiles = -(-rows // _ROWS)
    # A row may begin anywhere in a piece. The pitch is an odd number of pieces, so that
    # neighbouring rows begin in different banks of shared memory.
    pitch = _PIECE * (-(-(2 * kept + _PIECE - 2) // _PIECE) | 1)
    sums = _STAGES * _ROWS * _SAMPLES * n_tiles * 4
    of_warp = _STAGES * _ROWS * pitch + sums
    # Two small blocks on a multiprocessor wait less for their slowest warp than a large
    # one. But if one is enough for all columns, no sums of parts have to be added.
    most = min((available - _TABLE) // of_warp, MAX_WARPS[n_tiles])
    resident = 1 if chunks <= most and row_tiles < 4 * multiprocessors else 2
    shared = available // resident - (resident - 1) * _RESERVED - _TABLE
    most = max(min(shared // of_warp, MAX_WARPS[n_tiles] // resident), 1)
    splits = -(-chunks // most)
    warps = -(-chunks // splits)
    blocks = min(row_tiles, max(resident * multiprocessors // splits, 1))
    return Plan((blocks, splits), warps, pitch, _TABLE + warps * of_warp, n_tiles)


def multiply_few(
    x: Tensor,
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    kept: int,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """Write `x @ W.T + bias` into y, on the current device.

    Args:
        x: [batch, columns], contiguous, 1 to `MOST_VECTORS` rows.
        parts: Values, mask, offsets and starts of W, for which `can_multiply`.
        kept: What `side_index.tile_kept` returns.
        bias: [rows], or None.
        y: [batch, rows], contiguous.
    """
    values, mask, offsets, starts = parts
    (batch, columns), rows = x.shape, mask.shape[0]
    if x.data_ptr() % _PAIR:  # a view from an odd number on
        x = x.clone()
    plan = divide(rows, columns, batch, kept, _gpu(x.device))
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


def _n_tiles(batch: int) -> int:
    return -(-batch // _SAMPLES)


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
    source = (files("halve.runtime.cuda") / "few.cu").read_text("utf-8")
    options = [
        f"-DN_TILES={n_tiles}",
        f"-DHALF={int(dtype == torch.float16)}",
        f"-DMAX_WARPS={MAX_WARPS[n_tiles]}",
    ]
    return compile_source(source, architecture, options)
