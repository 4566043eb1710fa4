"""The packed formats that this version of Halve knows."""

from halve.formats.bitmask import Bitmask
from halve.formats.interface import Format
from halve.formats.quantized import Quantized
from halve.formats.stack import Stack

FORMATS: dict[str, Format] = {"quantized": Quantized(), "bitmask": Bitmask()}
# What finds tensors of which each slice is packed in one of them.
STACK = Stack(FORMATS)
# The formats that `halve pack` and `halve prune --pack` write; where two take the same
# bytes, the first.
WRITTEN = ("quantized", "bitmask")


def written_formats() -> list[Format]:
    """Return the formats that matrices are packed in."""
    return [FORMATS[name] for name in WRITTEN]


def companion_suffixes() -> tuple[str, ...]:
    """Return the suffixes of all tensors that may be beside a packed parameter."""
    suffixes = (f.companions + f.optional for f in FORMATS.values())
    return tuple(dict.fromkeys(suffix for each in suffixes for suffix in each))


def version_of(name: str) -> int:
    """Return the version of docs/format.md that specifies a format, or stacks."""
    return STACK.version if name == STACK.name else FORMATS[name].version
