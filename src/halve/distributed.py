"""Several processes that prune one model together, started by torchrun.

The only module that uses torch.distributed. `Ranks` describes this process and its
collectives; every collective of a single process returns its argument, so callers do
not distinguish the two cases.

A process that fails writes its error to torchrun's key-value store and closes its
connections. The others notice the closed connections, read the store, and raise the
same error. A process that is killed writes nothing; then they report that it is gone.
"""

import math
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from halve._compat.torch import Store, join_store
from halve.devices import auto_device
from halve.errors import DistributedError, HalveError, ReportedError

T = TypeVar("T")

# Of a collective. Long, because a process may solve a large matrix while the others
# wait for it. One that dies closes its connections and is noticed at once.
_TIMEOUT = timedelta(hours=6)
# How long a process that lost a connection waits for another one's error report.
_REPORT_WAIT_SECONDS = 3.0
# Elements per all-reduce; bounds the memory that the collective needs.
_MAX_REDUCED_ELEMENTS = 2**24
_FAILURE_COUNT, _FIRST_FAILURE = "halve/failures", "halve/first-failure"
_RESUME_HINT = (
    "Start the same command again to resume; the number of processes may differ."
)


class RankStopped(BaseException):
    """SIGTERM was received: torchrun stops this process because another one ended.

    Raised out of the signal handler, so at any instruction of any library. It is not an
    Exception, so that a handler that turns every Exception into a diagnosis, as when a
    file is parsed, does not make one of this. `join` turns it into a DistributedError.
    """


class _ConnectionLostError(DistributedError):
    """Another process has ended; its error report may be in the store."""


@dataclass(frozen=True)
class Ranks:
    """This process and the collectives of its group.

    All processes of a group must call the same collectives in the same order.

    Attributes:
        rank: Index of this process in the group.
        size: Number of processes in the group.
        local: Index of this process on its machine.
        local_size: Number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process reads and writes the output."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Return the device of this process, for a device that the user named.

        `cuda` becomes the GPU of its local index, and `auto` what `halve.devices` says.
        A GPU becomes the current one of the process: tensors that arrive from others
        are placed there.

        Raises:
            DistributedError: There are fewer GPUs than processes on this machine, or
                the name selects one GPU for all of them.
        """
        if self.size == 1:
            return name
        if name == "auto":
            name = auto_device()
        kind, _, index = name.partition(":")
        if kind != "cuda" or not torch.cuda.is_available():
            return name
        gpus = 1 if index else torch.cuda.device_count()
        if self.local_size > gpus:
            raise DistributedError(
                f"{self.local_size} processes need a GPU each, and --device {name} "
                f"means {gpus} here.",
                "Start one process for each GPU, with --device cuda, or use the CPU.",
            )
        chosen = name if index else f"cuda:{self.local}"
        torch.cuda.set_device(chosen)
        return chosen

    def my_indices(self, count: int, together: int = 1) -> list[int]:
        """Return the indices, of 0 to `count` - 1, that belong to this process.

        Args:
            count: Number of items.
            together: How many consecutive items go to one process before the next one
                gets as many.
        """
        return [i for i in range(count) if i // together % self.size == self.rank]

    def assign(self, costs: Sequence[float]) -> list[int]:
        """Return the rank that does each task, the same in every process.

        Greedy: the costliest task first, each to the rank with the lowest load; among
        equal loads to the highest rank, since rank 0 also writes the files.

        Args:
            costs: Estimated cost of each task, in any unit.
        """
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owner = min(reversed(range(self.size)), key=loads.__getitem__)
            loads[owner] += costs[index]
            owners[index] = owner
        return owners

    def broadcast_object(self, make: Callable[[], T], source: int = 0) -> T:
        """Return, in every process, what `make` returns in one.

        Args:
            make: Called in the source process only; the result must be picklable.
            source: Rank of that process.
        """
        if self.size == 1:
            return make()
        values = [make() if self.rank == source else None]
        with _translate_connection_errors():
            dist.broadcast_object_list(values, source, device=torch.device("cpu"))
        return cast("T", values[0])

    def broadcast_tensors(
        self, tensors: dict[str, Tensor] | None, source: int = 0
    ) -> dict[str, Tensor]:
        """Return, in every process, the tensors of one.

        Args:
            tensors: Name -> tensor; None in all but the source process.
            source: Rank of that process.
        """
        if self.size == 1:
            return tensors or {}
        result = {name: t.contiguous() for name, t in (tensors or {}).items()}
        headers = self.broadcast_object(
            lambda: {n: (t.shape, t.dtype, t.device.type) for n, t in result.items()},
            source,
        )
        for name, (shape, dtype, device) in headers.items():
            if self.rank != source:
                result[name] = torch.empty(shape, dtype=dtype, device=device)
            self.broadcast_(result[name], source)
        return result

    def broadcast_(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrite a contiguous tensor by that of one process, in place."""
        if self.size > 1:
            octets = tensor.view(-1).view(torch.uint8)  # not every dtype can be sent
            with _translate_connection_errors():
                dist.broadcast(octets, source)

    def all_gather_tensors(
        self, tensors: Sequence[Tensor], receive: bool
    ) -> list[Tensor]:
        """Return the tensors of all processes, in the order of their ranks.

        Args:
            tensors: Those of this process.
            receive: Whether this process keeps the result. If not, each process's
                tensors are freed as soon as they have arrived, and the result is empty.
        """
        gathered: list[Tensor] = []
        named = {str(index): tensor for index, tensor in enumerate(tensors)}
        for source in range(self.size):
            sent = named if source == self.rank else None
            received = self.broadcast_tensors(sent, source)
            gathered += received.values() if receive else ()
        return gathered

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over all processes, in place."""
        if self.size > 1:
            chunks = tensor.view(-1).split(_MAX_REDUCED_ELEMENTS)
            with _translate_connection_errors():
                for chunk in chunks:
                    dist.all_reduce(chunk)

    def all_sum(self, *values: float) -> tuple[float, ...]:
        """Return the sum of each value over all processes, with the same bits in each.

        `math.fsum` rounds once, so the order of the ranks does not matter.
        """
        if self.size == 1:
            return values
        return tuple(map(math.fsum, zip(*self.all_gather(values), strict=True)))

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks.

        Args:
            value: That of this process; it must be picklable.
        """
        if self.size == 1:
            return [value]
        gathered: list[T] = [value] * self.size
        with _translate_connection_errors():
            dist.all_gather_object(gathered, value)
        return gathered


SINGLE_PROCESS = Ranks()


@contextmanager
def join() -> Iterator[Ranks]:
    """Join the group of processes that torchrun has started, for a `with` block.

    Without torchrun, or with one process, yields `SINGLE_PROCESS`. An error in one
    process ends all of them.

    Raises:
        HalveError: What was raised in the block, by this process or, on rank 0, by the
            first one that failed.
        ReportedError: The same, on the other ranks. The process that failed and rank 0
            report it, so these need not.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not dist.is_torchelastic_launched():
        yield SINGLE_PROCESS
        return
    ranks, store = _connect()
    previous = signal.signal(signal.SIGTERM, _raise_stopped)
    try:
        yield ranks
    except (Exception, RankStopped) as error:
        # A second SIGTERM must not interrupt the report of the first error.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        to_raise = _error_to_raise(error, ranks, store)
        if to_raise is error:
            raise
        raise to_raise from error
    else:
        signal.signal(signal.SIGTERM, previous)
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _connect() -> tuple[Ranks, Store]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    ranks = Ranks(*(int(os.environ[name]) for name in names))
    has_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    if has_gpu and ranks.local < torch.cuda.device_count():
        torch.cuda.set_device(ranks.local)
    try:
        store, rank, size = join_store()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"Process {ranks.rank} of {ranks.size} could not connect to the others "
            f"({_summary(error)}).",
            "Check torchrun's addresses and ports, and GLOO_SOCKET_IFNAME.",
        ) from error
    return ranks, store


@contextmanager
def _translate_connection_errors() -> Iterator[None]:
    """Turn the RuntimeError of a collective into a _ConnectionLostError."""
    try:
        yield
    except RuntimeError as error:
        raise _ConnectionLostError(
            "Another process of this run ended without reporting an error, as when the "
            f"system kills it for lack of memory ({_summary(error)}).",
            _RESUME_HINT,
        ) from error


def _raise_stopped(signal_: int, frame: FrameType | None) -> None:
    raise RankStopped


def _error_to_raise(error: BaseException, ranks: Ranks, store: Store) -> BaseException:
    """Return what `join` raises for an error: the first failure of any process."""
    failure = _as_failure(error, ranks)
    first = _first_failure(store, failure)
    if first is failure:
        return error if isinstance(error, Exception) else failure
    return (
        first if ranks.is_main_process else ReportedError(first.problem, first.remedy)
    )


def _as_failure(error: BaseException, ranks: Ranks) -> HalveError:
    """Return the HalveError by which an error is reported to the other processes."""
    if isinstance(error, HalveError):
        return error
    if isinstance(error, RankStopped):
        return _ConnectionLostError(
            "This process was stopped by torchrun, which does so when another process "
            "of the run has ended without reporting an error.",
            _RESUME_HINT,
        )
    return DistributedError(
        f"Process {ranks.rank} of this run failed ({_summary(error)}).", _RESUME_HINT
    )


def _first_failure(store: Store, failure: HalveError) -> HalveError:
    """Report a failure unless another process has reported one; return the first.

    A process that only noticed that another one is gone waits for that one's report.
    """
    # The store lives in torchrun, which may have ended: then it raises RuntimeError.
    with suppress(RuntimeError):
        deadline = time.monotonic() + _REPORT_WAIT_SECONDS
        while isinstance(failure, _ConnectionLostError) and time.monotonic() < deadline:
            if store.check([_FIRST_FAILURE]):
                break
            time.sleep(0.1)
        if store.add(_FAILURE_COUNT, 1) > 1:
            return pickle.loads(store.get(_FIRST_FAILURE))
        report = pickle.dumps(failure)
        store.set(_FIRST_FAILURE, report)  # pyright: ignore[reportArgumentType]
    return failure


def _summary(error: BaseException) -> str:
    reason = " ".join(str(error).split())[:160].rstrip(". ")
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__
