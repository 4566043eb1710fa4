"""How matrices are stored, on the disk and in memory.

docs/format.md specifies the packed formats; `inputs` has those that are only read.
"""

from halve.formats.inputs import (
    ENTRIES,
    TEXT_CONFIG,
    check_readable,
    declared_entry,
    readers_of,
)
from halve.formats.interface import (
    MAX_LAYOUT,
    Format,
    Found,
    PackedMatrix,
    Reader,
    StoredMatrix,
    TensorHeader,
    split,
)
from halve.formats.registry import FORMATS, STACK, companion_suffixes
from halve.formats.stack import StackedMatrices, slice_module, slice_name
from halve.formats.storage import packed_size, store, store_stack, would_shrink
from halve.formats.version import (
    METHOD,
    VERSION,
    check_version,
    quantization_config,
)

__all__ = [
    "ENTRIES",
    "FORMATS",
    "MAX_LAYOUT",
    "METHOD",
    "STACK",
    "TEXT_CONFIG",
    "VERSION",
    "Format",
    "Found",
    "PackedMatrix",
    "Reader",
    "StackedMatrices",
    "StoredMatrix",
    "TensorHeader",
    "check_readable",
    "check_version",
    "companion_suffixes",
    "declared_entry",
    "packed_size",
    "quantization_config",
    "readers_of",
    "slice_module",
    "slice_name",
    "split",
    "store",
    "store_stack",
    "would_shrink",
]
