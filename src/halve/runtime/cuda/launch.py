"""Which kernel multiplies a batch, and how its work is divided.

All constants of the launches are here. A choice depends on shapes and dtypes alone,
never on data: a launch can be captured in a CUDA graph.
"""

# A warp decodes so many columns at once: 32 lanes, 8 columns each.
WARP_COLUMNS = 256
# Largest batch that Triton multiplies by packed weights. Where the kernel of `few`
# runs, it multiplies 2 vectors and more. All others are multiplied by unpacked weights.
PACKED_BATCH = 4
# Rows of a program that multiplies by packed weights.
PACKED_ROWS = 2
# Its warps share the columns of a row. More where rows are long.
_WARPS, _WARPS_LONG, _LONG = 4, 8, 8192
# It loads the mask words of so many steps at once, at least and at most.
_UNROLL = 4, 8
# Rows and warps of a program that multiplies by codes.
CODES_ROWS, CODES_WARPS = 4, 4
# Bytes of weights that are unpacked at once. Strips that stay in the L2 cache (50 MB on
# an H100) would take the GPU less time, but Python more time to launch than that saves.
STRIP_BYTES = 2**27
# The height of a strip is a multiple of this, as the tiles of matrix products are.
_STRIP_ROWS = 256
# Rows and warps of a program that unpacks.
UNPACK_ROWS, UNPACK_WARPS = 8, 4


def warps_of(columns: int) -> int:
    """Return the warps that share the columns of a row."""
    return _WARPS_LONG if columns >= _LONG else _WARPS


def unroll_of(columns: int, warps: int) -> int:
    """Return how many steps along a row load their words at once.

    Of 4 to 8 the one that leaves the fewest steps idle.
    """
    steps = -(-columns // (WARP_COLUMNS * warps))
    least, most = (min(steps, limit) for limit in _UNROLL)
    return min(range(most, least - 1, -1), key=lambda unroll: -steps % unroll)


def strip_rows(rows: int, columns: int, itemsize: int) -> int:
    """Return how many rows are unpacked at once."""
    fit = STRIP_BYTES // (columns * itemsize)
    return min(max(fit // _STRIP_ROWS, 1) * _STRIP_ROWS, rows)
