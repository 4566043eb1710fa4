"""Knuth's TwoSum on tiles of a matrix, as one Triton kernel.

Imports Triton at its top: import this module only where `has_triton` says so.
"""

# Triton's kernels are written in a language of their own: its pointers and blocks have
# no types in Python, and a kernel takes its strides one by one.
# ruff: noqa: ANN001, ANN202, PLR0913, PLR0917
# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and columns of the tile that one program adds: both `high`, by rows, and `low`,
# which is often a transposed view, by columns, are then read 256 bytes at a time.
_SIDE = 64


# Not specialized: the sizes of tiles would only make further variants to compile.
@triton.jit(do_not_specialize=["rows", "columns", "across"])
def _two_sum(
    high,
    low,
    terms,
    rows,
    columns,
    high_row,
    high_column,
    low_row,
    low_column,
    terms_row,
    terms_column,
    across,
    SIDE: tl.constexpr,
):
    program = tl.program_id(0)
    # 64 bits: a Gram matrix of 49152 columns has more than 2^31 elements.
    row = ((program // across) * SIDE + tl.arange(0, SIDE)).to(tl.int64)[:, None]
    column = ((program % across) * SIDE + tl.arange(0, SIDE)).to(tl.int64)[None, :]
    inside = (row < rows) & (column < columns)
    at_high = high + row * high_row + column * high_column
    at_low = low + row * low_row + column * low_column
    a = tl.load(at_high, mask=inside)
    b = tl.load(terms + row * terms_row + column * terms_column, mask=inside)
    # The order of the operations is that of `CompensatedSum.add`, so that the bits are
    # the same. There is no product, which the compiler could fuse with an addition.
    total = a + b
    virtual = total - a
    error = (a + (virtual - total)) + (b - virtual)
    tl.store(at_high, total, mask=inside)
    tl.store(at_low, tl.load(at_low, mask=inside) + error, mask=inside)


def add_two_sum(high: Tensor, low: Tensor, terms: Tensor) -> None:
    """Add `terms` to `high`, and the rounding errors of that to `low`.

    Args:
        high: [rows, columns], float32, of any strides; written to.
        low: The same shape, of any strides, in memory apart from `high`; written to.
        terms: The same shape, of any strides.
    """
    rows, columns = high.shape
    across = triton.cdiv(columns, _SIDE)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(high):
        _two_sum[(triton.cdiv(rows, _SIDE) * across,)](
            high,
            low,
            terms,
            rows,
            columns,
            *high.stride(),
            *low.stride(),
            *terms.stride(),
            across,
            SIDE=_SIDE,
        )
