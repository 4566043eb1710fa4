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
def split8(t, LANES: tl.constexpr):
    """Return the 8 columns of [LANES, 8], each [LANES]."""
    even, odd = tl.split(tl.reshape(t, (LANES, 4, 2)))
    e0, e1 = tl.split(tl.reshape(even, (LANES, 2, 2)))
    o0, o1 = tl.split(tl.reshape(odd, (LANES, 2, 2)))
    x0, x4 = tl.split(e0)
    x2, x6 = tl.split(e1)
    x1, x5 = tl.split(o0)
    x3, x7 = tl.split(o1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def join8(w0, w1, w2, w3, w4, w5, w6, w7, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Return [8 * LANES, ROWS] of 8 [LANES, ROWS], the columns of a lane together."""
    a, b = tl.join(w0, w1), tl.join(w2, w3)
    c, d = tl.join(w4, w5), tl.join(w6, w7)
    whole = tl.join(tl.join(a, b), tl.join(c, d))  # [LANES, ROWS, 2, 2, 2]
    return tl.reshape(tl.permute(whole, (0, 4, 3, 2, 1)), (8 * LANES, ROWS))
