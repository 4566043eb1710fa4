"""Columns fixed one after the other on a GPU: a whole block in one Triton kernel.

It computes what `carry` in `sweep.py` does for a block of `sweep`, and for one of the
coordinate descent in `quantized.py`. In plain torch a column takes two or three
launches on a GPU, or a dozen where it is quantized or chosen for n:m, of some 5 us
each; the arithmetic of a column takes less than one. Rows of a matrix do not depend on
each other once their masks are known, so a program takes a few rows and keeps their
part of the block in registers until the last column is fixed. Masks of n:m are chosen
in the kernel, group after group, and those of unstructured patterns before it.

Arithmetic is float32 and divisions are rounded to nearest, but sums are taken in
another order than on the CPU, so that results differ in their last bits.

The module imports triton, so it is imported only where that can be.
"""

# Triton compiles the kernels from their source: to Python, their arguments and what
# `tl` returns have no types. Constants are capitalized, in its own way.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# ruff: noqa: ANN001, ANN202, PLR0913, PLR0917

from dataclasses import dataclass
from functools import cache
from warnings import warn

import torch
import triton
import triton.language as tl
from torch import Tensor

from halve.errors import HalveWarning
from halve.grids import QuantParams, QuantScheme
from halve.patterns import NM

# The largest block: its columns times _MIN_ROWS fill the registers of _WARPS warps.
MAX_COLUMNS = 1024
# Numbers of a block that a program keeps in registers, 32 for each of its threads; and
# how many rows of the matrix they are spread over at least and at most. 32 rows are 128
# bytes, which is what a warp loads at once.
_TILE, _MIN_ROWS, _MAX_ROWS = 4096, 8, 32
_WARPS = 4
# Below that the tile would have fewer numbers than there are threads.
_MIN_COLUMNS = 16
# Added to a number below 2^22 in magnitude and subtracted again, it leaves the nearest
# integer, of two the even one, since float32 has no fractions from 2^23 on.
_ROUNDER = tl.constexpr(1.5 * 2**23)
# Far outside any grid, and with any zero point: what is clipped to it is rounded alike.
_FAR = tl.constexpr(1024.0)
_WITH_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _nearest(values, scale, zero, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
             MIDRISE: tl.constexpr):  # fmt: skip
    """Return the nearest values of a grid, as `QuantParams.fake_quantize` does."""
    codes = tl.div_rn(values, scale)
    if MIDRISE:
        codes = tl.floor(codes)
    else:
        codes = tl.clamp(codes, -_FAR, _FAR, _WITH_NAN)
        codes = (codes + _ROUNDER) - _ROUNDER + zero
    codes = tl.clamp(codes, LOWEST, HIGHEST, _WITH_NAN)
    rounded = (codes - zero) * scale
    return tl.where(rounded == 0, 0.0, rounded)  # no -0, which would be packed


@triton.jit
def _row(tile, is_row):
    """Return the one row, [ROWS], of a [SIZE, ROWS] tile that is_row, [SIZE], marks."""
    return tl.sum(tl.where(is_row[:, None], tile, 0.0), axis=0)


@triton.jit
def _lowest_of_group(scores, column, start, PRUNED: tl.constexpr, GROUP: tl.constexpr):
    """Return which scores are among the lowest of a group, as `NM.mask` does.

    Args:
        scores: [SIZE, ROWS]: a column of the matrix is a row.
        column: [SIZE], 0, 1, 2 and so on.
        start: The first column of the group.
        PRUNED: m - n.
        GROUP: m.

    Returns:
        [SIZE, ROWS], 1.0 where a weight is pruned and 0.0 elsewhere; of no meaning
        outside of the group.
    """
    rank = tl.zeros_like(scores)
    for member in range(GROUP):
        score = _row(scores, column == start + member)[None, :]
        # Of equal scores the first has the lower rank, so ranks are distinct.
        later = (column > start + member)[:, None]
        rank += tl.where((score < scores) | (later & (score == scores)), 1.0, 0.0)
    return tl.where(rank < PRUNED, 1.0, 0.0)


@triton.jit(do_not_specialize=["grid_groups", "first"])
def _fix_columns(
    values, before, finals, coefficients, pruned, errors, scale, zero,
    rows, coefficient_stride, grid_groups, first,
    COLUMNS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    SPAN: tl.constexpr, PRUNED: tl.constexpr, GRID_GROUP: tl.constexpr,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, MIDRISE: tl.constexpr,
    DESCENDS: tl.constexpr,
):  # fmt: skip
    """Fix the columns of a block for ROWS rows of the matrix.

    Args:
        values: [COLUMNS, rows], float32: the weights in a sweep, the residuals in a
            descent.
        before: [COLUMNS, rows], float32: the solution before this descent; not read in
            a sweep.
        finals: [COLUMNS, rows], float32, where final values are written; it may be
            `values`, but not `before`.
        coefficients: [COLUMNS, COLUMNS], float32; a row begins `coefficient_stride`
            numbers after the one before it.
        pruned: [COLUMNS, rows], uint8; not read where PRUNED is not 0.
        errors: [COLUMNS, rows], float32; written.
        scale: [rows, grid_groups], float32; not read where GRID_GROUP is 0.
        zero: As the scale.
        rows: Rows of the matrix.
        coefficient_stride: See the coefficients.
        grid_groups: Groups of a row of the matrix.
        first: Index of the block's first column in the matrix.
        COLUMNS: Columns of the block.
        SIZE: The next power of two.
        ROWS: Rows of the matrix that a program takes.
        SPAN: m of n:m; COLUMNS where the mask is given.
        PRUNED: m - n of n:m; 0 where the mask is given.
        GRID_GROUP: Columns that share a scale; 0 where nothing is quantized.
        LOWEST: The lowest code.
        HIGHEST: The highest code.
        MIDRISE: Whether 0 is midway between two codes.
        DESCENDS: Whether this is a coordinate descent, and not a sweep.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, SIZE)
    exists = (column < COLUMNS)[:, None] & inside[None, :]
    places = column[:, None] * rows + row[None, :]
    tile = tl.load(values + places, mask=exists, other=0.0)
    # No thread overwrites a value before all of them have loaded theirs. What is loaded
    # within the loop, and by several warps, is never written to.
    tl.debug_barrier()
    diagonal = tl.load(
        coefficients + column * (coefficient_stride + 1),
        mask=column < COLUMNS, other=1.0,
    )  # fmt: skip
    for start in range(0, COLUMNS, SPAN):
        chosen = tl.zeros_like(tile)
        if PRUNED:
            ratio = tl.div_rn(tile, tl.broadcast_to(diagonal[:, None], SIZE, ROWS))
            chosen = _lowest_of_group(ratio * ratio, column, start, PRUNED, SPAN)
        for offset in range(SPAN):
            j = start + offset
            value = _row(tile, column == j)
            divisor = tl.load(coefficients + j * (coefficient_stride + 1))
            divisor = tl.zeros_like(value) + divisor
            if PRUNED:
                is_pruned = _row(chosen, column == j) > 0
            else:
                is_pruned = tl.load(pruned + j * rows + row, mask=inside, other=0) != 0
            now = value
            wanted = value
            if DESCENDS:
                # The minimum of the error along this weight, while the others stay.
                now = tl.load(before + j * rows + row, mask=inside, other=0.0)
                wanted = now + tl.div_rn(value, divisor)
            if GRID_GROUP:
                group = row.to(tl.int64) * grid_groups + (first + j) // GRID_GROUP
                step = tl.load(scale + group, mask=inside, other=1.0)
                middle = tl.load(zero + group, mask=inside, other=0.0)
                wanted = _nearest(wanted, step, middle, LOWEST, HIGHEST, MIDRISE)
            final = tl.where(is_pruned, 0.0, wanted)
            error = final - now if DESCENDS else tl.div_rn(value - final, divisor)
            tl.store(finals + j * rows + row, final, mask=inside)
            tl.store(errors + j * rows + row, error, mask=inside)
            # A rank-one update of the columns that follow.
            factors = tl.load(
                coefficients + j * coefficient_stride + column,
                mask=(column > j) & (column < COLUMNS), other=0.0,
            )  # fmt: skip
            tile -= factors[:, None] * error[None, :]


@dataclass(frozen=True)
class BlockKernel:
    """The kernel for blocks of one kind, which is compiled when it is first used.

    Attributes:
        columns: Of a block.
        groups: Pattern whose masks are chosen in the kernel; None where they are given.
        grid: Grid to which kept weights are rounded; None where they are not.
        descends: Whether this is a coordinate descent, and not a sweep.
    """

    columns: int
    groups: NM | None
    grid: QuantScheme | None
    descends: bool = False

    def runs_on(self, device: torch.device) -> bool:
        """Whether blocks of this kind fit a kernel that this device can run.

        Raises a HalveWarning where there is no other reason than that Triton fails.
        """
        whole = self.groups is None or self.columns % self.groups.group == 0
        return self.columns <= MAX_COLUMNS and whole and _works(self, device)

    def fix(
        self,
        values: Tensor,
        finals: Tensor,
        coefficients: Tensor,
        pruned: Tensor | None,
        quant_params: QuantParams | None,
        first: int,
    ) -> Tensor:
        """Fix the columns of a block, each changing those after it.

        Column k changes by -coefficients[j, k] * error_j for every column j before it.
        In a sweep, the error of a weight w with the final value q is (w - q) divided by
        coefficients[j, j]. In a descent the values are residuals r, a weight goes from
        z to the grid value nearest to z + r / coefficients[j, j], and its error is the
        change.

        Args:
            values: [columns, rows], contiguous float32: weights, or residuals.
            finals: [columns, rows], contiguous float32; overwritten by final values. In
                a sweep the same tensor as `values`, in a descent the solution so far.
            coefficients: [columns, columns], float32; rows may lie apart.
            pruned: [columns, rows], bool, True where the final value is 0; None where
                the kernel chooses.
            quant_params: Scales of all columns of the matrix; None without a grid.
            first: Index of the block's first column in the matrix.

        Returns:
            The errors, [columns, rows].
        """
        assert values.is_contiguous() and finals.is_contiguous()
        assert coefficients.stride(1) == 1, "a row of coefficients is contiguous"
        errors = torch.empty_like(values)
        # Where the kernel reads none, it is given an address that it does not touch.
        mask = errors if pruned is None else pruned.contiguous().view(torch.uint8)
        scale = zero = errors
        if quant_params is not None:
            scale, zero = quant_params.scale, quant_params.zero
        before = finals.clone() if self.descends else errors
        tensors = (values, before, finals, coefficients, mask, errors)
        grids = (scale.contiguous(), zero.contiguous())
        rows, constants = values.shape[1], self.constants
        sizes = (rows, coefficients.stride(0), scale.shape[1], first)
        with torch.cuda.device_of(values):  # Triton launches on the current device
            _fix_columns[(triton.cdiv(rows, constants["ROWS"]),)](
                *tensors, *grids, *sizes, **constants, num_warps=self.warps
            )
        return errors

    @property
    def constants(self) -> dict[str, int]:
        """Return the constants of `_fix_columns`."""
        size = max(1 << (self.columns - 1).bit_length(), _MIN_COLUMNS)
        grid, groups = self.grid, self.groups
        return {
            "COLUMNS": self.columns,
            "SIZE": size,
            "ROWS": min(max(_TILE // size, _MIN_ROWS), _MAX_ROWS),
            "SPAN": groups.group if groups else self.columns,
            "PRUNED": groups.group - groups.kept if groups else 0,
            "GRID_GROUP": grid.group_size if grid else 0,
            "LOWEST": grid.lowest if grid else 0,
            "HIGHEST": grid.highest if grid else 0,
            "MIDRISE": bool(grid and grid.midrise),
            "DESCENDS": self.descends,
        }

    @property
    def warps(self) -> int:
        """Warps of a program: the larger its tile, the more."""
        tile = self.constants["SIZE"] * self.constants["ROWS"]
        return _WARPS * max(tile // _TILE, 1)


@cache
def _works(kernel: BlockKernel, device: torch.device) -> bool:
    """Whether a kernel can be compiled and run: it is tried once, on a block of ones.

    Triton needs a C compiler, to build what launches a kernel, and a driver that knows
    the GPU code of its assembler.
    """
    size = kernel.columns
    # Of most matrices the rows are a multiple of 16; Triton compiles others separately.
    block = torch.ones(size, _MAX_ROWS, device=device)
    eye = torch.eye(size, device=device)
    params = None
    if kernel.grid is not None:
        scale = block.new_ones(_MAX_ROWS, kernel.grid.groups(size))
        params = QuantParams(kernel.grid, scale, torch.zeros_like(scale))
    pruned = None if kernel.groups else torch.zeros_like(block, dtype=torch.bool)
    try:
        errors = kernel.fix(block, block, eye, pruned, params, 0)
        return bool(errors.isfinite().all())  # waits for the kernel
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (which ones is not documented)
        warn(
            "Triton cannot compile or run the kernel that prunes columns on this GPU "
            f"({type(error).__name__}: {error}). Pruning goes on without it and takes "
            "longer; install a C compiler, such as gcc, and a recent driver.",
            HalveWarning,
            stacklevel=2,
        )
        return False
