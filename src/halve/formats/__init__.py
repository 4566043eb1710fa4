"""How a sparse matrix lies on the disk and in memory; see docs/format.md."""

from halve.formats.bitmask import (
    COMPANIONS,
    DTYPES,
    MAX_LAYOUT,
    Packed,
    join,
    kept_weights,
    pack,
    packed_bytes,
    split,
    store,
)
from halve.formats.version import METHOD, check_version, quantization_config

__all__ = [
    "COMPANIONS",
    "DTYPES",
    "MAX_LAYOUT",
    "METHOD",
    "Packed",
    "check_version",
    "join",
    "kept_weights",
    "pack",
    "packed_bytes",
    "quantization_config",
    "split",
    "store",
]
