"""What becomes of a hostile file, found out in a process that may die of it.

A child is forked, so that nothing is imported twice; its peak of resident memory is
counted from there on. It is killed past its time.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from halve.errors import HalveError

SECONDS = 20
# Beside twice the file's size: tables of modules, and what allocators keep.
CONSTANT = 192 * 2**20
# Where the machine is protected; what is touched is what counts.
_ADDRESSES = 6 * 2**30
GOOD = ("read", "refused")


@dataclass(frozen=True)
class Verdict:
    """What became of it.

    Attributes:
        outcome: `read`, `refused`, `memory`, `hang`, or `crash`.
        detail: What was said.
        peak: Bytes of memory that were touched on the way.
    """

    outcome: str
    detail: str
    peak: int

    @property
    def is_good(self) -> bool:
        return self.outcome in GOOD


def judge(
    job: Callable[[], object], size: int, seconds: int = SECONDS, growth: int = 2
) -> Verdict:
    """Run a job that reads files of a size together, and say what became of it."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        _confess(job, sender, seconds)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        said = pipe.read().decode("utf-8", "replace")
    status = os.waitpid(child, 0)[1]
    return _verdict(said, status, growth * size + CONSTANT)


def _verdict(said: str, status: int, bound: int) -> Verdict:
    outcome, _, rest = said.partition("\n")
    peak, _, detail = rest.partition("\n")
    if os.WIFSIGNALED(status):
        killed = os.WTERMSIG(status)
        late = killed == signal.SIGALRM
        return Verdict("hang" if late else "crash", f"signal {killed}", 0)
    if not peak:
        return Verdict("crash", f"exit {status}", 0)
    if int(peak) > bound:
        outcome, detail = "memory", f"{peak} bytes where {bound} may be; {detail}"
    return Verdict(outcome, detail, int(peak))


def _confess(job: Callable[[], object], sender: int, seconds: int) -> None:
    """Do the job and write what became of it; never returns."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        _limit_addresses()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        before = _memory("VmRSS")
        outcome, detail = _outcome(job)
        peak = _memory("VmHWM") - before
        os.write(sender, f"{outcome}\n{peak}\n{detail}"[:2000].encode())
    finally:
        os._exit(0)


def _outcome(job: Callable[[], object]) -> tuple[str, str]:
    try:
        return "read", str(job())
    except HalveError as error:
        sound = error.problem.endswith(".") and error.remedy.endswith(".")
        return ("refused" if sound else "crash"), str(error)
    except BaseException as error:  # noqa: BLE001  (it is what is looked for)
        return "crash", f"{type(error).__name__}: {error} {_place(error)}"


def _place(error: BaseException) -> str:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    code = place.tb_frame.f_code if place else None
    return f"({code.co_filename}, {code.co_name})" if code else ""


def _limit_addresses() -> None:
    limit = _memory("VmSize") + _ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"{sys.platform} does not say {name}")
