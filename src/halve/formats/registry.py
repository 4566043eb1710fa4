"""The packed formats that this version of Halve knows."""

from collections.abc import Mapping

from halve.formats.bitmask import Bitmask
from halve.formats.interface import Format, TensorHeader
from halve.formats.quantized import Quantized

FORMATS: dict[str, Format] = {"quantized": Quantized(), "bitmask": Bitmask()}
# The formats that `halve pack` and `halve prune --pack` write; where two take the same
# bytes, the first.
WRITTEN = ("quantized", "bitmask")


def written_formats() -> list[Format]:
    """Return the formats that matrices are packed in."""
    return [FORMATS[name] for name in WRITTEN]


def recognize(name: str, headers: Mapping[str, TensorHeader]) -> str | None:
    """Return the name of the format in which a parameter is stored, None if dense.

    Args:
        name: Name of the parameter.
        headers: Name -> header of every tensor in the checkpoint.
    """
    for key, known in FORMATS.items():
        if known.recognizes(name, headers):
            return key
    return None
