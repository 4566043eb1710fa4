"""Durations and sizes as a reader would write them."""


def duration(seconds: float | None) -> str:
    """Return a duration for reading: `12.3 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds is None:
        return "?"
    if seconds < 100:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def size(count: int) -> str:
    """Return a number of bytes with a binary unit, such as `1.5 GiB`."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:  # noqa: PLR2004
        value /= 1024
        units.pop(0)
    return f"{value:.3g} {units[0]}"
