"""Launches of the kernels for matrices of codes; capturable as `bitmask_products` is.

Operands must be consistent and checked (`QuantizedMatrix.check`); the kernels trust
them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from halve.runtime.cuda import launch
from halve.runtime.cuda.bitmask_products import launch_kernel, linear_into, on_device
from halve.runtime.cuda.codes_kernels import codes_rows_kernel, codes_vectors_kernel

_LANES = 32


class Codes(NamedTuple):
    """A matrix of codes as the kernels take it.

    Attributes:
        codes: uint8.
        scales: [rows, groups], float16.
        zeros: Codes of zero as bits, uint8, or None.
        mask: [rows, words], uint64, or None.
        offsets: [rows + 1], uint32 or uint64; None without a mask.
        starts: [rows, words], as `side_index.word_starts` returns them; likewise.
        columns: Columns of the matrix.
        bits: Of a code.
        group: Columns that share a scale.
        midrise: Whether zero lies midway between two codes.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    mask: Tensor | None
    offsets: Tensor | None
    starts: Tensor | None
    columns: int
    bits: int
    group: int
    midrise: bool

    @classmethod
    def of(cls, parts: Sequence[Tensor | None], layout: Sequence[int]) -> Self:
        """Return the matrix of some tensors.

        Args:
            parts: Codes, scales, codes of zero, mask, offsets and starts.
            layout: Columns, bits, group size, and whether the grid is midrise.

        Raises:
            RuntimeError: Their sizes contradict each other.
        """
        codes, scales, zeros, mask, offsets, starts = parts
        assert codes is not None and scales is not None
        columns, bits, group, midrise = layout
        matrix = cls(
            *(codes, scales, zeros, mask, offsets, starts),
            *(columns, bits, group, bool(midrise)),
        )
        if not matrix.fits:
            raise RuntimeError(
                f"the parts of a quantized matrix of {matrix.rows} rows and {columns} "
                "columns do not fit together"
            )
        return matrix

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.scales.shape[0]

    @property
    def stride(self) -> int:
        """Bytes of a row, if all of its weights have codes."""
        return -(-self.columns * self.bits // 8)

    @property
    def fits(self) -> bool:
        """Whether the parts have the sizes that the kernels rely on."""
        rows, groups = self.rows, -(-self.columns // self.group)
        words = rows * -(-self.columns // 64)
        sizes = (
            (self.scales, rows * groups),
            (self.zeros, rows * -(-groups * self.bits // 8)),
            (self.mask, words),
            (self.offsets, rows + 1),
            (self.starts, words),
            (self.codes if self.mask is None else None, rows * self.stride),
        )
        with_mask = {part is None for part in (self.mask, self.offsets, self.starts)}
        return len(with_mask) == 1 and all(
            part is None or (part.numel() == size and part.is_contiguous())
            for part, size in sizes
        )

    @property
    def pointers(self) -> list[Tensor]:
        """The parts in the order of the kernels; codes in the place of what is absent.

        Codes are absent themselves if no weight is stored: an empty tensor has no
        address, but nothing is read from it either.
        """
        parts = self.codes, self.scales, self.zeros, self.mask, self.offsets
        return [self.codes if p is None else p for p in (*parts, self.starts)]

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        sizes = self.bits, self.stride, self.codes.data_ptr()
        return {
            "COLUMNS": self.columns,
            "BITS": self.bits,
            "GROUP": min(self.group, self.columns),
            "ZEROS": self.zeros is not None,
            "MIDRISE": self.midrise,
            "MASKED": self.mask is not None,
            "ALIGNED": _is_aligned(*sizes),
        }


def _is_aligned(bits: int, stride: int, address: int) -> bool:
    """Whether the codes of 8 columns, so many bytes as a code has bits, are aligned."""
    power_of_two = bits & (bits - 1) == 0
    return power_of_two and stride % bits == 0 and address % bits == 0


def multiply(x: Tensor, matrix: Codes, bias: Tensor | None = None) -> Tensor:
    """Return `x @ W.T + bias`, [..., rows], by the kernel that suits the batch.

    Args:
        x: [..., columns], with any strides; bfloat16, float16 or float32.
        matrix: W.
        bias: [rows], of the dtype of x.
    """
    y = x.new_empty(*x.shape[:-1], matrix.rows)
    vectors = x.reshape(-1, matrix.columns).contiguous()
    results = y.view(-1, matrix.rows)
    with on_device(x):
        if vectors.shape[0] == 0:
            pass
        elif vectors.shape[0] <= launch.PACKED_BATCH:
            multiply_packed(vectors, matrix, bias, results)
        else:
            multiply_unpacked(vectors, matrix, bias, results)
    return y


def multiply_packed(
    x: Tensor,
    matrix: Codes,
    bias: Tensor | None,
    y: Tensor,
    *,
    rows: int = launch.CODES_ROWS,
    warps: int = launch.CODES_WARPS,
) -> None:
    """Write x W.T + bias into y, for a few vectors, without unpacking W.

    Args:
        x: [batch, columns], contiguous.
        matrix: W.
        bias: [rows], or None.
        y: [batch, rows], contiguous.
        rows: Rows a program, a power of two.
        warps: Warps a program, likewise.
    """
    launch_kernel(
        codes_vectors_kernel,
        -(-matrix.rows // rows),
        *(x, *matrix.pointers, x if bias is None else bias, y, matrix.rows),
        BATCH=x.shape[0],
        LANES=_LANES * warps,
        ROWS=rows,
        UNROLL=launch.unroll_of(matrix.columns, warps),
        BIASED=bias is not None,
        num_warps=warps,
        **matrix.constants,
    )


def multiply_unpacked(x: Tensor, matrix: Codes, bias: Tensor | None, y: Tensor) -> None:
    """Write x W.T + bias into y, [batch, rows], by torch's product.

    W is unpacked strip by strip, in the dtype of x, into one scratch.
    """
    height = launch.strip_rows(matrix.rows, matrix.columns, x.element_size())
    scratch = x.new_empty(height, matrix.columns)
    for begin in range(0, matrix.rows, height):
        end = min(begin + height, matrix.rows)
        weight = scratch[: end - begin]
        unpack_rows(matrix, begin, weight)
        part = None if bias is None else bias[begin:end]
        linear_into(y[:, begin:end], x, weight, part)


def unpack_rows(matrix: Codes, begin: int, dense: Tensor) -> None:
    """Write the rows from `begin` on into `dense`, [count, columns]."""
    with on_device(dense):
        _launch_rows(matrix, None, begin, dense)


def lookup(ids: Tensor, matrix: Codes, dtype: torch.dtype) -> Tensor:
    """Return the rows of W that are named, [..., columns]; NaN for one that is not.

    Args:
        ids: Indices of rows, of any shape.
        matrix: W.
        dtype: Of the result.
    """
    found = matrix.scales.new_empty(*ids.shape, matrix.columns, dtype=dtype)
    if found.numel():
        with on_device(found):
            rows = found.view(-1, matrix.columns)
            _launch_rows(matrix, ids.reshape(-1).contiguous(), 0, rows)
    return found


def _launch_rows(matrix: Codes, ids: Tensor | None, begin: int, dense: Tensor) -> None:
    rows, count = launch.UNPACK_ROWS if ids is None else 1, dense.shape[0]
    tiles = -(-matrix.columns // launch.WARP_COLUMNS)
    launch_kernel(
        codes_rows_kernel,
        -(-count // rows) * tiles,
        *(dense if ids is None else ids, *matrix.pointers, dense),
        *(begin, count, matrix.rows),
        LANES=_LANES,
        ROWS=rows,
        LOOKUP=ids is not None,
        num_warps=launch.UNPACK_WARPS if ids is None else 1,
        **matrix.constants,
    )
