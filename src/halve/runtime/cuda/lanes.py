"""Parts of kernels in which a lane holds 8 neighbouring columns.

Kernels are written for tiles of [lanes, rows], lanes along dimension 0: Triton's
default layout lets that dimension vary fastest over the lanes of a warp. The other way
round lanes run down the rows, and loads cost twice as much.
"""

# In Triton's types a kernel's tensors and integers are neither.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl


@triton.jit
def popcount(v):
    """Count the bits of 64-bit integers; uint32.

    LLVM recognizes this idiom and makes `popc` of it, unless it knows that the upper
    bits are 0.
    """
    v = v - ((v >> 1) & 0x5555555555555555)
    v = (v & 0x3333333333333333) + ((v >> 2) & 0x3333333333333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((v * 0x0101010101010101) >> 56).to(tl.uint32)


@triton.jit
def load8(x, column, COLUMNS: tl.constexpr, LANES: tl.constexpr, WITHIN: tl.constexpr):
    """Return 8 neighbouring inputs of each lane, in float32: 8 tensors [LANES, 1].

    Args:
        x: [COLUMNS].
        column: First column of each lane, [LANES].
        COLUMNS: Inputs past them are 0.
        LANES: Of the tile.
        WITHIN: Whether all columns exist.
    """
    columns = column[:, None] + tl.arange(0, 8)[None, :]
    if WITHIN:
        inputs = tl.load(x + columns)
    else:
        inputs = tl.load(x + columns, mask=columns < COLUMNS, other=0)
    even, odd = tl.split(tl.reshape(inputs.to(tl.float32), (LANES, 4, 2)))
    e0, e1 = tl.split(tl.reshape(even, (LANES, 2, 2)))
    o0, o1 = tl.split(tl.reshape(odd, (LANES, 2, 2)))
    x0, x4 = tl.split(e0)
    x2, x6 = tl.split(e1)
    x1, x5 = tl.split(o0)
    x3, x7 = tl.split(o1)
    return (
        x0[:, None], x1[:, None], x2[:, None], x3[:, None],
        x4[:, None], x5[:, None], x6[:, None], x7[:, None],
    )  # fmt: skip


@triton.jit
def join8(weights, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Return [8 * LANES, ROWS] of 8 [LANES, ROWS], the columns of a lane together."""
    w0, w1, w2, w3, w4, w5, w6, w7 = weights
    a, b = tl.join(w0, w1), tl.join(w2, w3)
    c, d = tl.join(w4, w5), tl.join(w6, w7)
    whole = tl.join(tl.join(a, b), tl.join(c, d))  # [LANES, ROWS, 2, 2, 2]
    return tl.reshape(tl.permute(whole, (0, 4, 3, 2, 1)), (8 * LANES, ROWS))


@triton.jit
def dot8(weights, inputs):
    """Return the sum of 8 weights times their inputs, in float32."""
    w0, w1, w2, w3, w4, w5, w6, w7 = weights
    x0, x1, x2, x3, x4, x5, x6, x7 = inputs
    total = w0.to(tl.float32) * x0 + w1.to(tl.float32) * x1
    total += w2.to(tl.float32) * x2 + w3.to(tl.float32) * x3
    total += w4.to(tl.float32) * x4 + w5.to(tl.float32) * x5
    return total + (w6.to(tl.float32) * x6 + w7.to(tl.float32) * x7)


@triton.jit
def zeros(BATCH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Return BATCH tensors of zeros, [LANES, ROWS], float32."""
    totals = ()
    for _ in tl.static_range(BATCH):
        totals = totals + (tl.zeros((LANES, ROWS), tl.float32),)  # noqa: RUF005
    return totals


@triton.jit
def add_products(
    totals, weights, scale, x, column,
    BATCH: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
    WITHIN: tl.constexpr,
):  # fmt: skip
    """Add the weights of 8 columns, times a scale, times the inputs of each vector.

    Args:
        totals: BATCH tensors [LANES, ROWS].
        weights: 8 tensors [LANES, ROWS].
        scale: [LANES, ROWS], or 1.
        x: [BATCH, COLUMNS].
        column: First column of each lane, [LANES].
        BATCH: Vectors.
        COLUMNS: As in `load8`.
        LANES: As in `load8`.
        WITHIN: As in `load8`.
    """
    sums = ()
    for vector in tl.static_range(BATCH):
        inputs = load8(x + vector * COLUMNS, column, COLUMNS, LANES, WITHIN)
        total = totals[vector] + dot8(weights, inputs) * scale
        sums = sums + (total,)  # noqa: RUF005
    return sums


@triton.jit
def store_sums(
    totals, bias, y, row, own, rows, BATCH: tl.constexpr, BIASED: tl.constexpr
):
    """Store the sums over all lanes into y, [BATCH, rows].

    Args:
        totals: BATCH tensors [LANES, ROWS].
        bias: [rows]; not read unless BIASED.
        y: [BATCH, rows].
        row: Rows of the tile, [ROWS].
        own: The same, those past the last replaced by the last.
        rows: Rows of the matrix.
        BATCH: Vectors.
        BIASED: Whether there is a bias.
    """
    for vector in tl.static_range(BATCH):
        found = tl.sum(totals[vector], axis=0)
        if BIASED:
            found += tl.load(bias + own).to(tl.float32)
        to = y + vector * rows + row
        tl.store(to, found.to(y.dtype.element_ty), mask=row < rows)
