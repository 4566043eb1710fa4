"""Numbers as a reader would write them."""

import re
from math import ceil, floor, isfinite, log10

# A time as records hold it.
_UTC = re.compile(r"(\d+-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?\+00:00")


def percent(fraction: float, digits: int | None = None) -> str:
    """Return a fraction in per cent, such as `50 %` or `0.31 %`.

    Args:
        fraction: The fraction.
        digits: Digits after the point; by default three significant ones, without
            zeros at the end.
    """
    value = 100 * fraction
    if digits is not None:
        return f"{value:.{digits}f} %"
    return f"{significant(value)} %"


def significant(value: float, digits: int = 3) -> str:
    """Return a number of so many significant digits, without zeros at the end.

    Integers keep all their digits; tiny numbers are written as `1.2e-07`.
    """
    if not isfinite(value):
        raise ValueError(f"{value} is not finite")
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    if abs(value) < 1e-4:  # noqa: PLR2004
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{power}"
    text = f"{value:.{digits - 1 - floor(log10(abs(value)))}f}"
    return text.rstrip("0").rstrip(".")


def with_error(value: float, error: float | None, unit: str = "") -> str:
    """Return a value and its standard error, rounded to two digits of the error."""
    if error is None or error == 0:
        return f"{significant(value, 4)}{unit}"
    digits = min(max(1 - floor(log10(abs(error))), 0), 9)
    return f"{value:.{digits}f} ± {error:.{digits}f}{unit}"


def count(number: int) -> str:
    """Return an integer with its digits in groups, such as `1,234,567`."""
    return f"{number:,}"


def counted(number: int, noun: str) -> str:
    """Return a number of things, such as `1 thread` or `4 threads`."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def moment(text: str) -> str:
    """Return a time of a record as `2026-11-28 01:02:03 UTC`; other text as it is."""
    found = _UTC.fullmatch(text)
    return f"{found[1]} {found[2]} UTC" if found else text


def linear_ticks(highest: float, about: int = 4) -> list[float]:
    """Return round numbers from 0 to at least `highest`, in equal steps."""
    if highest <= 0:
        return [0.0, 1.0]
    rough = highest / about
    power = 10.0 ** floor(log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    return [step * index for index in range(ceil(highest / step - 1e-9) + 1)]


def log_ticks(lowest: float, highest: float) -> list[float]:
    """Return powers of ten, or 1, 2 and 5 times them, that enclose two numbers.

    Args:
        lowest: Positive.
        highest: At least `lowest`.
    """
    powers = range(floor(log10(lowest)) - 1, ceil(log10(highest)) + 2)
    factors = (1,) if log10(highest / lowest) > 2 else (1, 2, 5)  # noqa: PLR2004
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    first = max((tick for tick in ticks if tick <= lowest), default=ticks[0])
    last = min((tick for tick in ticks if tick >= highest), default=ticks[-1])
    if first == last:
        last = ticks[ticks.index(first) + 1]
    return [tick for tick in ticks if first <= tick <= last]
