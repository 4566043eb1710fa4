"""Formats of quantized and sparse releases: Halve reads them, and never writes them.

One module for each, with the source of its layout. `methods` says which of them a
config.json names.
"""

from halve.formats.inputs.methods import (
    ENTRIES,
    TEXT_CONFIG,
    check_readable,
    declared_entry,
    readers_of,
)

__all__ = [
    "ENTRIES",
    "TEXT_CONFIG",
    "check_readable",
    "declared_entry",
    "readers_of",
]
