"""SIGINT and SIGTERM: the shard at hand is given up, and how to go on is said.

Nothing more is needed, since a run may be killed at any instant. Handlers are set by
the command line alone: a program that uses Halve as a library keeps its own.
"""

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_RESUMABLE = ("prune", "pack", "unpack")


class Interrupted(BaseException):
    """A signal has come.

    Not a KeyboardInterrupt, which typer takes for itself; and no Exception, so that
    what goes on after errors does not go on after this.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that died of it: 130 or 143."""
        return 128 + self.number


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise Interrupted; the second one kills outright.

    A signal that is ignored stays so, as SIGINT is in what a shell runs in the
    background.
    """
    before = {n: signal.getsignal(n) for n in _SIGNALS} if _in_main_thread() else {}
    own = {n: found for n, found in before.items() if found is not signal.SIG_IGN}
    for number in own:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found or signal.SIG_DFL)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _interrupt(number: int, _: FrameType | None) -> None:
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_DFL)
    raise Interrupted(number)


def how_to_go_on(interrupted: Interrupted) -> str:
    """Return one line for the user whose command was interrupted."""
    name = signal.Signals(interrupted.number).name
    if sys.argv[1:2] and sys.argv[1] in _RESUMABLE:
        command = shlex.join(["halve", *sys.argv[1:]])
        return f"Interrupted by {name}. The same command goes on from here: {command}"
    return f"Interrupted by {name}."
