"""Formatting of what is printed on standard output."""

import datetime
import shlex
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from halve.quantities import duration, size

# Commands import the last two from here as well.
__all__ = ["duration", "local_time", "percent", "print_next", "print_table", "size"]


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


def percent(fraction: float | None) -> str:
    """Return a fraction as a percentage; `-` for None."""
    return "-" if fraction is None else f"{100 * fraction:.2f}%"
