"""The templates of page and card, and how their values become text."""

import unicodedata
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

# Unicode's categories of control characters and surrogates.
_HARMFUL = {"Cc", "Cs"}
# Override or embed a direction, beyond the end of a text if that does not end them.
_TURNS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


def environment(autoescape: bool) -> Environment:
    """Return what renders templates; a name that is not given is an error.

    Args:
        autoescape: Whether values are escaped for HTML.
    """
    made = Environment(
        loader=PackageLoader("halve.reporting", "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    made.filters["n"] = _coordinate
    made.filters["n2"] = lambda value: f"{value:.2f}".lstrip("0")
    return made


def _coordinate(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _printable(value: Any) -> Any:  # noqa: ANN401
    """Return a text without characters that HTML cannot hold, anything else as it is.

    Control characters, and surrogates as in names of files that are not UTF-8.
    """
    if type(value) is not str:
        return value
    return "".join(_replaced(character) for character in value)


def _replaced(character: str) -> str:
    is_harmless = character in "\n\t" or unicodedata.category(character) not in _HARMFUL
    return character if is_harmless and character not in _TURNS else "\ufffd"
