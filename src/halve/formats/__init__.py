"""How a sparse matrix lies on the disk and in memory; see docs/format.md."""

from halve.formats.bitmask import (
    COMPANIONS,
    DTYPES,
    Packed,
    join,
    pack,
    packed_bytes,
    split,
    store,
)
from halve.formats.version import METHOD, check_version, quantization_config

__all__ = [
    "COMPANIONS",
    "DTYPES",
    "METHOD",
    "Packed",
    "check_version",
    "join",
    "pack",
    "packed_bytes",
    "quantization_config",
    "split",
    "store",
]
