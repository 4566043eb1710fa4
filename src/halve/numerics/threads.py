"""The number of threads of torch's operations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch's operations in the calling thread for a while.

    The first parallel one starts OpenMP's pool of threads, which does not survive a
    fork: a child process that computes would wait for them for ever.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
