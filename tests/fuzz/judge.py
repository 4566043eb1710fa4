"""Parse a hostile file in a child process that may crash, and classify the outcome.

The child is forked, so that it imports nothing again. Its peak resident memory is
measured from the fork on, and it is killed when its time is over.
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
# Bytes allowed in addition to twice the file's size: module tables, and memory that
# allocators do not return.
ALLOWANCE = 192 * 2**20
# Address space, to protect the machine. The bound that counts is on resident memory.
_MAX_ADDRESS_SPACE = 6 * 2**30
GOOD = ("read", "refused")


@dataclass(frozen=True)
class Verdict:
    """The outcome of parsing one input.

    Attributes:
        outcome: `read`; `refused` (a HalveError); or a failure: `memory`, `hang`,
            `crash`.
        detail: The result, or the error message.
        peak: Peak resident memory since the fork, in bytes.
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
    """Run a job in a child process, and classify its outcome.

    Args:
        job: Parses the files.
        size: Total size of the files, in bytes.
        seconds: Time after which the child is killed.
        growth: Allowed memory, in multiples of `size`, besides `ALLOWANCE`.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        _run_child(job, sender, seconds)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        report = pipe.read().decode("utf-8", "replace")
    status = os.waitpid(child, 0)[1]
    return _verdict(report, status, growth * size + ALLOWANCE)


def _verdict(report: str, status: int, bound: int) -> Verdict:
    outcome, _, rest = report.partition("\n")
    peak, _, detail = rest.partition("\n")
    if os.WIFSIGNALED(status):
        killed = os.WTERMSIG(status)
        timed_out = killed == signal.SIGALRM
        return Verdict("hang" if timed_out else "crash", f"signal {killed}", 0)
    if not peak:
        return Verdict("crash", f"exit {status}", 0)
    if int(peak) > bound:
        outcome, detail = "memory", f"{peak} bytes, but the bound is {bound}; {detail}"
    return Verdict(outcome, detail, int(peak))


def _run_child(job: Callable[[], object], sender: int, seconds: int) -> None:
    """Run the job and write its outcome to the pipe; never returns."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        _limit_addresses()
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
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
        is_complete = error.problem.endswith(".") and error.remedy.endswith(".")
        return ("refused" if is_complete else "crash"), str(error)
    except BaseException as error:  # noqa: BLE001  (a finding)
        return "crash", f"{type(error).__name__}: {error} {_place(error)}"


def _place(error: BaseException) -> str:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    code = place.tb_frame.f_code if place else None
    return f"({code.co_filename}, {code.co_name})" if code else ""


def _limit_addresses() -> None:
    limit = _memory("VmSize") + _MAX_ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"{sys.platform} does not report {name}")
