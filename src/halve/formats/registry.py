"""The packed formats that this version of Halve knows."""

from halve.formats.bitmask import Bitmask
from halve.formats.interface import Format
from halve.formats.quantized import Quantized

FORMATS: dict[str, Format] = {"quantized": Quantized(), "bitmask": Bitmask()}
# The formats that `halve pack` and `halve prune --pack` write; where two take the same
# bytes, the first.
WRITTEN = ("quantized", "bitmask")


def written_formats() -> list[Format]:
    """Return the formats that matrices are packed in."""
    return [FORMATS[name] for name in WRITTEN]
