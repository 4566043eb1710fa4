"""Progress on standard error: a bar on a terminal, lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from halve.cli.console import duration, percent, size

if TYPE_CHECKING:
    from halve.records import Progress as BlockProgress


@dataclass(frozen=True)
class Step:
    """What is shown of a running command.

    Attributes:
        text: What it does now.
        fraction: How much of it is done, 0 to 1; None if that is not known.
        seconds_left: Estimated time until it ends; None to extrapolate from `fraction`.
        line: What stays visible above the bar; empty if there is nothing to say.
    """

    text: str
    fraction: float | None = None
    seconds_left: float | None = None
    line: str = ""


Show = Callable[[Step], None]


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Show]:
    """Yield a function that shows a step; with `quiet` it shows nothing."""
    if quiet:
        yield lambda step: None
    elif sys.stderr.isatty():
        with _bar(Console(stderr=True)) as bar:
            task = bar.add_task("starting", total=None, seconds_left=None)
            yield lambda step: _update(bar, task, step)
    else:
        yield _print


def step_of_block(progress: "BlockProgress") -> Step:
    """Return what is shown of a run over blocks."""
    done = progress.finished
    line = ""
    if done is not None:
        error = "" if done.error is None else f"error {percent(done.error)}, "
        peak = f"peak memory {size(done.bytes_peak)}"
        line = f"{done.name}: {error}{duration(done.seconds)}, {peak}"
    return Step(
        f"block {progress.block + 1} of {progress.blocks}: {progress.phase}",
        progress.block / progress.blocks,
        progress.seconds_left,
        line,
    )


def _print(step: Step) -> None:
    left = step.seconds_left
    tail = "" if left is None else f", {duration(left)} left"
    lines = [step.line] if step.line else []
    print(*lines, f"{step.text}{tail}", sep="\n", file=sys.stderr, flush=True)


def _bar(console: Console) -> Progress:
    """Return a bar of one line: where that is too narrow, the bar itself is shorter."""
    line = Column(no_wrap=True)
    return Progress(
        SpinnerColumn(table_column=line),
        TextColumn("{task.description}", table_column=line),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:.0f}%", table_column=line),
        TimeElapsedColumn(table_column=line),
        _Left(table_column=line),
        _Peak(table_column=line),
        console=console,
        transient=True,
    )


def _update(bar: Progress, task: int, step: Step) -> None:
    if step.line:
        bar.console.print(step.line, highlight=False)
    bar.update(
        task,  # pyright: ignore[reportArgumentType]
        description=step.text,
        total=None if step.fraction is None else 1.0,
        completed=step.fraction or 0.0,
        seconds_left=step.seconds_left,
    )


class _Left(ProgressColumn):
    """The time left, as reported, or as extrapolated from what is done."""

    def render(self, task: Task) -> Text:
        left = task.fields["seconds_left"]
        if left is None and task.completed and task.elapsed:
            left = task.elapsed * (1 / task.completed - 1)
        return Text("" if left is None else f"{duration(left)} left")


class _Peak(ProgressColumn):
    """The peak of the process's memory so far."""

    def render(self, task: Task) -> Text:
        return Text(f"peak {size(_peak_memory())}")


def _peak_memory() -> int:
    # Not at the top: `runtime` imports torch.
    from halve.system import peak_memory

    return peak_memory()
