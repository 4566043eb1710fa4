"""SIGINT and SIGTERM: discard the current shard, and print how to resume.

No cleanup is needed, because a run may be killed at any instant. Only the command line
installs these handlers; a program that uses Halve as a library keeps its handlers.
"""

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_RESUMABLE = ("prune", "pack", "unpack", "recover")


class Interrupted(BaseException):
    """Raised on SIGINT and SIGTERM.

    It is not a KeyboardInterrupt, because typer handles that itself, and not an
    Exception, so that code which recovers from errors does not catch it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Exit code that shells report for this signal: 130 or 143."""
        return 128 + self.number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted on SIGINT and SIGTERM; a second signal kills the process.

    A signal that is ignored stays ignored: shells do that with SIGINT in background
    jobs.
    """
    before = {n: signal.getsignal(n) for n in _SIGNALS} if _in_main_thread() else {}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _interrupt(number: int, _: FrameType | None) -> None:
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_DFL)
    raise Interrupted(number)


def resume_hint(interrupted: Interrupted) -> str:
    """Return the line to print after an interruption: the signal, and how to resume."""
    name = signal.Signals(interrupted.number).name
    if sys.argv[1:2] and sys.argv[1] in _RESUMABLE:
        command = shlex.join(["halve", *sys.argv[1:]])
        return f"Interrupted by {name}. Rerun the same command to resume: {command}"
    return f"Interrupted by {name}."
