"""Formatting of what is printed on standard output."""

import datetime
import shlex
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print a table whose first column is text and whose others are numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        # A name that is cut, or a number, is of no use; other columns may wrap.
        table.add_column(
            column,
            justify="right" if index else "left",
            no_wrap=not index,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        # A file has no width limit; q_proj and k_proj would be cut to the same name.
        console = Console(width=Console(width=10_000).measure(table).maximum)
    console.print(table)


def print_next(*commands: Sequence[str]) -> None:
    """Print what may be done next, as command lines; on a terminal only."""
    if sys.stdout.isatty():
        lines = [shlex.join(["halve", *command]) for command in commands]
        print("\nNext: " + "\n      ".join(lines))


def local_time(moment: str) -> str:
    """Return a time in ISO 8601 as the clock here shows it, to the second."""
    local = datetime.datetime.fromisoformat(moment).astimezone()
    return local.strftime("%Y-%m-%d %H:%M:%S")


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


def percent(fraction: float | None) -> str:
    """Return a fraction as a percentage; `-` for None."""
    return "-" if fraction is None else f"{100 * fraction:.2f}%"
