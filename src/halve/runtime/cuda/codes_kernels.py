"""Products with, unpacking of and lookups in matrices of codes, in Triton.

The kernels read the tensors of a file as they are (docs/format.md): codes of 2, 3, 4 or
8 bits, of all weights or of those that a mask marks; a scale, and perhaps a code of
zero, for each group of columns. A lane takes 8 neighbouring columns of a row. Without a
mask their codes are as many bytes as a code has bits. With one, the side index and the
bits below the lane's own say where its codes begin, as in `bitmask_kernels`.

A weight is (code - zero) * scale. Inputs stay what they are: they are not rounded to
integers as on the CPU, and everything is added in float32.

Names that all kernels share: codes, uint8; scales, [rows, groups]; zeros, uint8; mask
and starts, [rows, words]; offsets, [rows + 1]; COLUMNS, BITS and GROUP (columns) of the
matrix; ZEROS, MIDRISE and MASKED, whether it has codes of zero, is midrise, has a mask;
ALIGNED, whether a lane's codes are aligned to their size; LANES and ROWS of a
program's tile. What a matrix lacks is not read.
"""

# In Triton's types a kernel's tensors and integers are neither.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

from halve.runtime.cuda.lanes import add_products, join8, popcount, store_sums, zeros

# 2^22, in whose float32 the lowest bit means 1/2: code c is float(2 c | these bits) -
# 2^22, exactly, and so is c minus a half-integer. It takes a fourth of the time of a
# conversion of integers, of which a multiprocessor does few.
_MAGIC = tl.constexpr(2.0**22)
_MAGIC_BITS = tl.constexpr(0x4A800000)


@triton.jit
def _load_bytes(
    bytes, at, end, COUNT: tl.constexpr, WORD: tl.constexpr
):  # fmt: skip
    """Return COUNT bytes at `at`, lowest first; those from `end` on are 0."""
    word = tl.zeros(at.shape, WORD)
    for i in tl.static_range(COUNT):
        byte = tl.load(bytes + at + i, mask=at + i < end, other=0)
        word |= byte.to(WORD) << (8 * i)
    return word


@triton.jit
def _dense_codes(
    codes, row, column,
    COLUMNS: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return the codes of 8 columns, lowest first, of matrices without a mask.

    Args:
        codes: [rows, STRIDE].
        row: [ROWS], int64.
        column: First column of each lane, [LANES].
        COLUMNS: As above.
        BITS: As above.
        ALIGNED: As above.
    """
    STRIDE: tl.constexpr = (COLUMNS * BITS + 7) // 8
    WORD: tl.constexpr = tl.uint64 if BITS == 8 else tl.uint32
    byte = (column // 8 * BITS)[:, None]
    at = (row * STRIDE)[None, :] + byte
    if ALIGNED:
        UNIT: tl.constexpr = (
            tl.uint64 if BITS == 8 else tl.uint32 if BITS == 4 else tl.uint16
        )
        place = (codes + at).to(tl.pointer_type(UNIT))
        word = tl.load(place, mask=byte < STRIDE, other=0).to(WORD)
    else:
        word = _load_bytes(codes, at, ((row + 1) * STRIDE)[None, :], BITS, WORD)
    return word


@triton.jit
def _kept_codes(
    codes, mask, offsets, starts, row, column,
    COLUMNS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Return 8 bits of the mask, and the next 8 codes of the row, lowest first.

    Args:
        codes: [bytes].
        mask: [rows, words].
        offsets: Byte at which each row begins, [rows + 1].
        starts: Codes of a row before each word, [rows, words].
        row: [ROWS], int64.
        column: First column of each lane, [LANES].
        COLUMNS: As above.
        BITS: As above.
    """
    WORDS: tl.constexpr = (COLUMNS + 63) // 64
    WORD: tl.constexpr = tl.uint64 if BITS == 8 else tl.uint32
    at = (row * WORDS)[None, :] + (column // 64)[:, None]
    inside = (column < COLUMNS)[:, None]
    shift = (column % 64).to(tl.uint64)[:, None]
    word = tl.load(mask + at, mask=inside, other=0).to(tl.uint64)
    start = tl.load(starts + at, mask=inside, other=0).to(tl.uint32)
    below = (tl.full(shift.shape, 1, tl.uint64) << shift) - 1
    bit = ((start + popcount(word & below)) * BITS).to(tl.int64)
    begin = tl.load(offsets + row).to(tl.int64)[None, :] + (bit >> 3)
    end = tl.load(offsets + row + 1).to(tl.int64)[None, :]
    # 8 codes take BITS bytes, and one more if they do not begin at a byte.
    COUNT: tl.constexpr = 8 if BITS == 8 else BITS + 1
    found = _load_bytes(codes, begin, end, COUNT, tl.uint64)
    return (word >> shift).to(tl.uint32), (found >> (bit & 7).to(tl.uint64)).to(WORD)


@triton.jit
def _zero(zeros, row, group, inside, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Return the codes of zero of groups, [LANES, ROWS], float32."""
    STRIDE: tl.constexpr = (GROUPS * BITS + 7) // 8
    bit = group * BITS
    at = zeros + (row * STRIDE)[None, :] + (bit // 8)[:, None]
    code = tl.load(at, mask=inside, other=0).to(tl.uint32)
    if BITS == 3:  # a code may lie in two bytes
        both = inside & (bit % 8 > 8 - BITS)[:, None]
        code |= tl.load(at + 1, mask=both, other=0).to(tl.uint32) << 8
    code = (code >> (bit % 8).to(tl.uint32)[:, None]) & ((1 << BITS) - 1)
    return code.to(tl.float32)


@triton.jit
def _difference(word, zero, BITS: tl.constexpr):
    """Return the lowest code minus zero, in float32."""
    code = (word & ((1 << BITS) - 1)).to(tl.uint32) << 1
    return (code | _MAGIC_BITS).to(tl.float32, bitcast=True) - (_MAGIC + zero)


@triton.jit
def _dequantize(
    codes, scales, zeros, mask, offsets, starts, row, column,
    COLUMNS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, MIDRISE: tl.constexpr, MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return code - zero of a lane's 8 columns, and their scale.

    All are [LANES, ROWS], float32. The columns are in one group: a group has a multiple
    of 32 columns, or all of the row.
    """
    GROUPS: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    inside = (column < COLUMNS)[:, None]
    group = column // GROUP
    scale = scales + (row * GROUPS)[None, :] + group[:, None]
    scale = tl.load(scale, mask=inside, other=0).to(tl.float32)
    if ZEROS:
        zero = _zero(zeros, row, group, inside, GROUPS, BITS)
    else:
        zero = (1 << (BITS - 1)) - 0.5 * MIDRISE
    differences = ()
    if MASKED:
        bits, word = _kept_codes(
            codes, mask, offsets, starts, row, column, COLUMNS, BITS
        )  # fmt: skip
        for j in tl.static_range(8):
            kept = (bits >> j & 1) != 0
            difference = tl.where(kept, _difference(word, zero, BITS), 0.0)
            differences = differences + (difference,)  # noqa: RUF005
            word = tl.where(kept, word >> BITS, word)
    else:
        word = _dense_codes(codes, row, column, COLUMNS, BITS, ALIGNED)
        for j in tl.static_range(8):
            difference = _difference(word >> (BITS * j), zero, BITS)
            differences = differences + (difference,)  # noqa: RUF005
    return differences, scale


@triton.jit
def _scaled(differences, scale, DTYPE: tl.constexpr):
    """Return the 8 weights of a lane, rounded to a dtype."""
    weights = ()
    for j in tl.static_range(8):
        # + 0 turns the -0 of a negative scale into 0.
        weight = (differences[j] * scale + 0.0).to(DTYPE)
        weights = weights + (weight,)  # noqa: RUF005
    return weights


@triton.jit
def codes_vectors_kernel(
    x, codes, scales, zero_codes, mask, offsets, starts, bias, y, rows,
    BATCH: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, ZEROS: tl.constexpr, MIDRISE: tl.constexpr,
    MASKED: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, UNROLL: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Write y = x W.T + bias for x, [BATCH, COLUMNS]; ROWS rows of W a program.

    Rows past the last are read as the last. UNROLL steps along a row are written out.
    """
    STEP: tl.constexpr = 8 * LANES
    WITHIN: tl.constexpr = COLUMNS % (UNROLL * STEP) == 0
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.minimum(row, rows - 1).to(tl.int64)
    lane = tl.arange(0, LANES)
    totals = zeros(BATCH, LANES, ROWS)
    for begin in range(0, COLUMNS, UNROLL * STEP):
        for step in tl.static_range(UNROLL):
            column = begin + step * STEP + lane * 8
            differences, scale = _dequantize(
                codes, scales, zero_codes, mask, offsets, starts, own, column,
                COLUMNS, BITS, GROUP, ZEROS, MIDRISE, MASKED, ALIGNED,
            )  # fmt: skip
            totals = add_products(
                totals, differences, scale, x, column, BATCH, COLUMNS, LANES, WITHIN
            )
    store_sums(totals, bias, y, row, own, rows, BATCH, BIASED)


@triton.jit
def codes_rows_kernel(
    ids, codes, scales, zero_codes, mask, offsets, starts, dense, begin, count, rows,
    COLUMNS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, MIDRISE: tl.constexpr, MASKED: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    LOOKUP: tl.constexpr,
):  # fmt: skip
    """Write dense[i] = row ids[i] of W if LOOKUP, else row begin + i, for i < count.

    A row that does not exist becomes NaN: an index cannot be checked without waiting
    for the GPU. Programs are numbered row by row: a grid of one dimension has room for
    any matrix.
    """
    TILES: tl.constexpr = (COLUMNS + 8 * LANES - 1) // (8 * LANES)
    tile = tl.program_id(0) % TILES
    place = (tl.program_id(0) // TILES).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if LOOKUP:
        row = tl.load(ids + place, mask=place < count, other=0).to(tl.int64)
    else:
        row = begin + place
    own = tl.minimum(tl.maximum(row, 0), rows - 1)
    column = tile * 8 * LANES + tl.arange(0, LANES) * 8
    differences, scale = _dequantize(
        codes, scales, zero_codes, mask, offsets, starts, own, column,
        COLUMNS, BITS, GROUP, ZEROS, MIDRISE, MASKED, ALIGNED,
    )  # fmt: skip
    if LOOKUP:
        scale = tl.where((row == own)[None, :], scale, float("nan"))
    weight = join8(_scaled(differences, scale, dense.dtype.element_ty), LANES, ROWS)
    columns = tile * 8 * LANES + tl.arange(0, 8 * LANES)
    exists = (columns < COLUMNS)[:, None] & (place < count)[None, :]
    tl.store(dense + (place * COLUMNS)[None, :] + columns[:, None], weight, mask=exists)
