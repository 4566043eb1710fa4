"""How a pruned matrix is stored, on the disk and in memory; see docs/format.md."""

from halve.formats.interface import (
    MAX_LAYOUT,
    Format,
    PackedMatrix,
    TensorHeader,
    split,
)
from halve.formats.registry import FORMATS, recognize
from halve.formats.storage import packed_size, store, would_shrink
from halve.formats.version import (
    METHOD,
    VERSION,
    check_version,
    quantization_config,
)

__all__ = [
    "FORMATS",
    "MAX_LAYOUT",
    "METHOD",
    "VERSION",
    "Format",
    "PackedMatrix",
    "TensorHeader",
    "check_version",
    "packed_size",
    "quantization_config",
    "recognize",
    "split",
    "store",
    "would_shrink",
]
