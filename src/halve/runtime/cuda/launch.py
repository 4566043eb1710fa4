"""Which kernel multiplies a batch, and how its work is divided.

All constants of the launches are here. A choice depends on shapes and dtypes alone,
never on data: a launch can be captured in a CUDA graph.
"""

# A warp decodes so many columns at once: 32 lanes, 8 columns each.
WARP_COLUMNS = 256
# Largest batch that is multiplied by the packed weights, one launch for each vector.
# Larger ones are multiplied by unpacked weights.
VECTOR_BATCH = 4
# Rows of a program of the kernel of one vector; on an H100 1 to 8 were timed.
VECTOR_ROWS = 2
# Its warps share the columns of a row. More where rows are long.
_WARPS, _WARPS_LONG, _LONG = 4, 8, 8192
# It loads the mask words of at most so many steps at once.
_UNROLL = 8
# Bytes of weights that are unpacked at once, to stay in the L2 (50 MB on an H100).
STRIP_BYTES = 2**24
# The height of a strip is a multiple of this, as the tiles of matrix products are.
_STRIP_ROWS = 256
# Rows and warps of a program that unpacks.
UNPACK_ROWS, UNPACK_WARPS = 8, 4


def vector_warps(columns: int) -> int:
    """Return the warps that share the columns of a row."""
    return _WARPS_LONG if columns >= _LONG else _WARPS


def vector_unroll(columns: int, warps: int) -> int:
    """Return how many steps along a row load their words at once.

    The largest divisor of the number of steps, so that no step is idle.
    """
    steps = -(-columns // (WARP_COLUMNS * warps))
    return next(unroll for unroll in range(_UNROLL, 0, -1) if steps % unroll == 0)


def strip_rows(rows: int, columns: int, itemsize: int) -> int:
    """Return how many rows are unpacked at once."""
    fit = STRIP_BYTES // (columns * itemsize)
    return min(max(fit // _STRIP_ROWS, 1) * _STRIP_ROWS, rows)
