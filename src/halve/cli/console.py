"""Formatting: tables on standard output, progress on standard error."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print a table whose first column is text and whose others are numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        # A file has no width limit; q_proj and k_proj would be cut to the same name.
        console = Console(width=Console(width=10_000).measure(table).maximum)
    console.print(table)


@contextmanager
def progress_line(quiet: bool) -> "Iterator[Callable[[str], None]]":
    """Yield a function that updates a status line; without a terminal, it prints lines.

    With `quiet` it prints nothing.
    """
    if quiet:
        yield lambda text: None
    elif sys.stderr.isatty():
        with Console(stderr=True).status("starting") as status:
            yield status.update
    else:
        yield lambda text: print(text, file=sys.stderr, flush=True)


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
