"""The end of a process that torchrun started."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exit_without_teardown() -> Iterator[None]:
    """End the process after the block, without unloading libraries, under torchrun.

    Once all work is done and printed, native threads of the libraries sometimes abort
    the interpreter while it shuts down ("terminate called without an active exception":
    1 of 36 runs of two processes on a busy machine, docs/log.md). torchrun would report
    a finished run as failed, and with several machines wait five minutes for others.

    Without torchrun, and where the block raises anything but SystemExit, does nothing.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    code: object = 0
    try:
        yield
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
