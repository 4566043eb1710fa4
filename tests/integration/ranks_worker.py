"""What test_ranks.py lets torchrun start: jobs in one go, or a command in trouble."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from halve.cli import app, main
from halve.distributed import join
from halve.errors import NumericalError
from halve.options import PruneOptions, RunOptions
from halve.pruning import prune_model
from halve.pruning.progress import ProgressReporter


def do_jobs(path: str) -> None:
    """Prune what a file of [model, out, settings] lists, with one group for all."""
    with join() as ranks:
        for model, out, settings in json.loads(Path(path).read_text()):
            prune_model(model, out, PruneOptions(**settings), RunOptions(), ranks)


def get_into_trouble(kind: str, rank: str, phase: str) -> None:
    """Let one rank die or fail when it comes to a phase of the second block.

    By "propagating" all ranks have finished the first block, and only that one. The
    one that fails is slow to say so: the others have ended by then, and torchrun has
    told it to stop.
    """
    real, printable = ProgressReporter.report, app._printable

    def report(self, block, now):
        if os.environ["RANK"] == rank and block == 1 and now == phase:
            if kind == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise NumericalError("The rank had a bad day.", "Let it rest.")
        real(self, block, now)

    def dawdle(message):
        if os.environ["RANK"] == rank:
            time.sleep(2)
        return printable(message)

    ProgressReporter.report = report  # pyright: ignore[reportAttributeAccessIssue]
    app._printable = dawdle
    main()


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "jobs":
        do_jobs(*rest)
    else:
        sys.argv[1:] = rest[2:]
        get_into_trouble(what, *rest[:2])
