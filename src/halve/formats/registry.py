"""The packed formats that this version of Halve knows."""

from collections.abc import Mapping

from halve.formats.bitmask import Bitmask
from halve.formats.interface import Format, TensorHeader

FORMATS: dict[str, Format] = {"bitmask": Bitmask()}
# The format that `halve pack` and `halve prune --pack` write.
WRITTEN = "bitmask"


def written_format() -> Format:
    """Return the format that matrices are packed in."""
    return FORMATS[WRITTEN]


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
