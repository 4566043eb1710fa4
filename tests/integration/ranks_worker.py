"""Started by test_ranks.py under torchrun: several jobs, or a command that fails."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from halve.cli import app, main
from halve.cli.rank_exit import exit_without_teardown
from halve.distributed import join
from halve.errors import NumericalError
from halve.options import PruneOptions, RunOptions
from halve.pruning import prune_model
from halve.pruning.progress import ProgressReporter


def do_jobs(path: str) -> None:
    """Prune each [model, out, options] that a JSON file lists, in one process group."""
    with join() as ranks:
        for model, out, options in json.loads(Path(path).read_text()):
            prune_model(model, out, PruneOptions(**options), RunOptions(), ranks)


def fail_at(kind: str, rank: str, phase: str) -> None:
    """Run the command line, and let one rank die or fail in the second block.

    When the phase is "propagating", all ranks have finished the first block, and no
    other. A rank that fails waits before it prints the error: the others have ended by
    then, and torchrun has sent it SIGTERM.

    Args:
        kind: "dies", by SIGKILL, or "fails", by a HalveError.
        rank: Which one.
        phase: Name of the phase at whose start it happens.
    """
    real, printable = ProgressReporter.report, app._printable

    def report(self, block, now, *finished):
        if os.environ["RANK"] == rank and block == 1 and now == phase:
            if kind == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise NumericalError("The matrix is singular.", "Increase the damping.")
        real(self, block, now, *finished)

    def print_late(message):
        if os.environ["RANK"] == rank:
            time.sleep(2)
        return printable(message)

    ProgressReporter.report = report  # pyright: ignore[reportAttributeAccessIssue]
    app._printable = print_late
    main()


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    with exit_without_teardown():
        if what == "jobs":
            do_jobs(*rest)
        else:
            sys.argv[1:] = rest[2:]
            fail_at(what, *rest[:2])
