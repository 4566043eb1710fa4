"""Products with and unpacking of bitmask matrices, in Triton.

The kernels read the tensors of a file as they are (docs/format.md), and the side index
(`side_index`). A lane takes 8 neighbouring columns of a row, a warp 256. It loads the
mask word and its start, which 8 lanes share, and counts the bits below its own: that is
where its first value lies. `ptx` says how it decodes its columns from there.

Triton's interpreter, by which the kernels are tested without a GPU, knows no PTX. There
the decoding is the same algorithm in Triton (`INLINE` false).

Names that all kernels share: values, [kept + SLACK]; mask and starts, [rows, words];
offsets, [rows + 1]; COLUMNS of the matrix; LANES and ROWS of a program's tile; WHOLE,
whether ROWS divides the number of rows.
"""

# In Triton's types a kernel's tensors and integers are neither.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

from halve.runtime.cuda import ptx
from halve.runtime.cuda.lanes import (
    add_products,
    dot8,
    join8,
    load8,
    popcount,
    store_sums,
    zeros,
)

_ADD_OPERANDS = tl.constexpr(ptx.MULTIPLY_ADD_OPERANDS)
_ADD_BF16 = tl.constexpr(ptx.multiply_add("bf16"))
_ADD_FP16 = tl.constexpr(ptx.multiply_add("fp16"))
_ADD_FP32 = tl.constexpr(ptx.multiply_add("fp32"))
# Expanded values are bits, so float16 needs no other PTX than bfloat16.
_EXPAND_16 = tl.constexpr(ptx.expand("bf16"))
_EXPAND_32 = tl.constexpr(ptx.expand("fp32"))
_OPERANDS_16 = tl.constexpr(ptx.expand_operands("bf16"))
_OPERANDS_32 = tl.constexpr(ptx.expand_operands("fp32"))


@triton.jit
def _load(pointers, inside, WITHIN: tl.constexpr):
    """Load words or starts; 0 where a lane is past the end of its row.

    WITHIN says that no lane is: a masked load costs one more instruction.
    """
    if WITHIN:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside, other=0)


@triton.jit
def _locate(word, start, shift, row_values):
    """Return a lane's 8 bits, lowest first (others above), and its first value.

    Args:
        word: The word of a lane's columns.
        start: Stored values of the row before that word.
        shift: Position of the lane's bits in the word.
        row_values: Pointer to the first value of the row.
    """
    word = word.to(tl.uint64)
    below = (tl.full(shift.shape, 1, tl.uint64) << shift) - 1
    place = row_values + (start.to(tl.uint32) + popcount(word & below))
    return (word >> shift).to(tl.uint32), place


@triton.jit
def _expand4(bits, place):
    """Return the weights of 4 columns: what `ptx` does, in Triton."""
    v0, v1 = tl.load(place), tl.load(place + 1)
    v2, v3 = tl.load(place + 2), tl.load(place + 3)
    zero = tl.zeros_like(v0)
    a, b = (bits & 1) != 0, (bits & 2) != 0
    c, d = (bits & 4) != 0, (bits & 8) != 0
    w0 = tl.where(a, v0, zero)
    v0, v1, v2 = tl.where(a, v1, v0), tl.where(a, v2, v1), tl.where(a, v3, v2)
    w1 = tl.where(b, v0, zero)
    v0, v1 = tl.where(b, v1, v0), tl.where(b, v2, v1)
    w2 = tl.where(c, v0, zero)
    w3 = tl.where(d, tl.where(c, v1, v0), zero)
    return w0, w1, w2, w3


@triton.jit
def _expand(bits, place, INLINE: tl.constexpr):
    """Return the weights of a lane's 8 columns, zeros included."""
    dtype: tl.constexpr = place.dtype.element_ty
    if INLINE:
        wide: tl.constexpr = dtype == tl.float32
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            _EXPAND_32 if wide else _EXPAND_16, _OPERANDS_32 if wide else _OPERANDS_16,
            [bits, place.to(tl.uint64)],
            dtype=((tl.int32 if wide else tl.int16),) * 8, is_pure=True, pack=1,
        )  # fmt: skip
        w0, w1 = w0.to(dtype, bitcast=True), w1.to(dtype, bitcast=True)
        w2, w3 = w2.to(dtype, bitcast=True), w3.to(dtype, bitcast=True)
        w4, w5 = w4.to(dtype, bitcast=True), w5.to(dtype, bitcast=True)
        w6, w7 = w6.to(dtype, bitcast=True), w7.to(dtype, bitcast=True)
    else:
        w0, w1, w2, w3 = _expand4(bits, place)
        w4, w5, w6, w7 = _expand4(bits >> 4, place + popcount(bits.to(tl.uint64) & 15))
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _multiply_add(total, bits, place, inputs, INLINE: tl.constexpr):
    """Return total + the weights of 8 columns times their inputs, in float32."""
    x0, x1, x2, x3, x4, x5, x6, x7 = inputs
    if INLINE:
        dtype: tl.constexpr = place.dtype.element_ty
        code: tl.constexpr = (
            _ADD_BF16 if dtype == tl.bfloat16
            else _ADD_FP16 if dtype == tl.float16 else _ADD_FP32
        )  # fmt: skip
        total = tl.inline_asm_elementwise(
            code, _ADD_OPERANDS,
            [total, bits, place.to(tl.uint64), x0, x1, x2, x3, x4, x5, x6, x7],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        total += dot8(_expand(bits, place, INLINE), inputs)
    return total


@triton.jit
def vectors_kernel(
    x, values, mask, offsets, starts, bias, y, rows,
    BATCH: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, UNROLL: tl.constexpr, WHOLE: tl.constexpr, BIASED: tl.constexpr,
    INLINE: tl.constexpr,
):  # fmt: skip
    """Write y = x W.T + bias for x, [BATCH, COLUMNS]; ROWS rows of W a program.

    A lane waits for a word before it can load values, so the words of UNROLL steps
    along the row are loaded at once. The barrier keeps ptxas from moving them back to
    their steps. (On an H100 one step was as fast; smaller GPUs may differ.)

    COLUMNS is a constant, so that offsets within a row become immediates. Rows past the
    last are read as the last; clamping them costs instructions, hence WHOLE.
    """
    STEP: tl.constexpr = 8 * LANES
    STEP_WORDS: tl.constexpr = LANES // 8
    WORDS: tl.constexpr = (COLUMNS + 63) // 64
    WITHIN: tl.constexpr = COLUMNS % (UNROLL * STEP) == 0
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = (row if WHOLE else tl.minimum(row, rows - 1)).to(tl.int64)
    lane = tl.arange(0, LANES)
    shift = (lane % 8 * 8).to(tl.uint64)[:, None]
    row_values = values + tl.load(offsets + own).to(tl.int64)[None, :]
    at = (own * WORDS)[None, :] + (lane // 8)[:, None]
    mask, starts = mask + at, starts + at
    totals = zeros(BATCH, LANES, ROWS)
    for begin in range(0, COLUMNS, UNROLL * STEP):
        words, firsts = (), ()
        for step in tl.static_range(UNROLL):
            inside = (begin // 64 + step * STEP_WORDS + lane // 8 < WORDS)[:, None]
            word = _load(mask + step * STEP_WORDS, inside, WITHIN)
            start = _load(starts + step * STEP_WORDS, inside, WITHIN)
            words = words + (word,)  # noqa: RUF005  (Triton knows no unpacking)
            firsts = firsts + (start,)  # noqa: RUF005
        if UNROLL > 1 and INLINE:
            tl.debug_barrier()
        for step in tl.static_range(UNROLL):
            bits, place = _locate(words[step], firsts[step], shift, row_values)
            column = begin + step * STEP + lane * 8
            if BATCH == 1:
                inputs = load8(x, column, COLUMNS, LANES, WITHIN)
                totals = (_multiply_add(totals[0], bits, place, inputs, INLINE),)
            else:
                weights = _expand(bits, place, INLINE)
                totals = add_products(
                    totals, weights, 1, x, column, BATCH, COLUMNS, LANES, WITHIN
                )
        mask += UNROLL * STEP_WORDS
        starts += UNROLL * STEP_WORDS
    store_sums(totals, bias, y, row, own, rows, BATCH, BIASED)


@triton.jit
def unpack_kernel(
    values, mask, offsets, starts, dense, begin, end,
    COLUMNS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    INLINE: tl.constexpr,
):  # fmt: skip
    """Write dense[row - begin] = row of W, zeros included, for the rows [begin, end).

    Programs are numbered row by row: a grid of one dimension has room for any matrix.
    """
    WORDS: tl.constexpr = (COLUMNS + 63) // 64
    TILES: tl.constexpr = (COLUMNS + 8 * LANES - 1) // (8 * LANES)
    tile = tl.program_id(0) % TILES
    row = begin + tl.program_id(0) // TILES * ROWS + tl.arange(0, ROWS)
    own = tl.minimum(row, end - 1).to(tl.int64)
    lane = tl.arange(0, LANES)
    word = tile * (LANES // 8) + lane // 8
    shift = (lane % 8 * 8).to(tl.uint64)[:, None]
    row_values = values + tl.load(offsets + own).to(tl.int64)[None, :]
    at = (own * WORDS)[None, :] + word[:, None]
    inside = (word < WORDS)[:, None]
    words, firsts = _load(mask + at, inside, False), _load(starts + at, inside, False)
    bits, place = _locate(words, firsts, shift, row_values)
    weight = join8(_expand(bits, place, INLINE), LANES, ROWS)
    column = tile * 8 * LANES + tl.arange(0, 8 * LANES)
    to = ((row - begin).to(tl.int64) * COLUMNS)[None, :] + column[:, None]
    exists = (column < COLUMNS)[:, None] & (row < end)[None, :]
    tl.store(dense + to, weight, mask=exists)
