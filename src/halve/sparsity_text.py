"""The text of a sparsity: `0.5`, `50%` or `2:4`. No torch here.

`halve.patterns` makes patterns of it; options check it before torch is imported.
"""

import re
from math import floor, inf, nan

from halve.errors import PatternError


def parse_sparsity(
    text: str | float, allow_dense: bool = False
) -> float | tuple[int, int]:
    """Parse a sparsity.

    Args:
        text: A fraction (0.5), a percentage (50%), or n:m, such as 2:4.
        allow_dense: Whether a sparsity of 0 is accepted.

    Returns:
        The fraction, in (0, 1), or n and m with 0 < n < m.

    Raises:
        PatternError: The text is none of these.
    """
    if isinstance(text, str) and (match := re.fullmatch(r"(\d+):(\d+)", text.strip())):
        kept, group = int(match[1]), int(match[2])
        if 0 < kept < group:
            return kept, group
    elif 0 < (sparsity := _fraction(text)) < 1 or (sparsity == 0 and allow_dense):
        return sparsity
    raise PatternError(
        f"{text!r} is not a sparsity: a fraction between 0 and 1 or an n:m pattern "
        "with 0 < n < m was expected.",
        _remedy(text),
    )


def parse_expert_fraction(text: str | float) -> float:
    """Parse a fraction of experts to keep, in (0, 1).

    Raises:
        PatternError: The text is none.
    """
    if 0 < (fraction := _fraction(text)) < 1:
        return fraction
    raise PatternError(
        f"{text!r} is not a fraction of experts to keep: a number between 0 and 1 or a "
        "percentage was expected.",
        "Write it as 75% or 0.75, or omit experts to keep all (--experts).",
    )


def parse_part(text: str | float, whole: int) -> int:
    """Parse a number (32), or a percentage of a whole (25%), which is rounded down.

    Returns:
        The number; -1 where the text is neither, or negative.
    """
    number = _fraction(text)
    if isinstance(text, str) and text.strip().endswith("%"):
        return floor(number * whole + 1e-9) if 0 <= number < inf else -1
    return int(number) if number >= 0 and number.is_integer() else -1


def _fraction(text: str | float) -> float:
    """Parse a number or a percentage; NaN where the text is neither."""
    try:
        if isinstance(text, str) and text.strip().endswith("%"):
            return float(text.strip()[:-1]) / 100
        return float(text)
    except ValueError:
        return nan


def _remedy(text: str | float) -> str:
    # Not accepted as a percentage: 1 would be one per cent, and 1.0 the whole model.
    if 2 <= (number := _fraction(text)) < 100 and "%" not in str(text):  # noqa: PLR2004
        return f"Write {number:g}% if that many per cent were meant."
    return "Write it as 50%, 0.5 or 2:4 (n kept of every m)."
