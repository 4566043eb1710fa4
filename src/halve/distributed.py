"""Several processes that work on one model together, as torchrun starts them.

The only module that knows torch.distributed. `Ranks` is a value: who this process is
among how many, and what they can tell each other. Alone, every verb of it gives back
what it was given, so that no one need ask how many there are.

A process that fails leaves word in the store that torchrun keeps, and closes its
connections; the others, woken by that, raise what it said. One that dies leaves none.
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
from halve.errors import DistributedError, HalveError, ReportedError

T = TypeVar("T")

# A process may solve a large matrix for long while the others wait for it. One that
# dies closes its connections, and is noticed at once.
_PATIENCE = timedelta(hours=6)
# How long one that was cut off waits for the word of the one that failed, in seconds.
_WORD_COMES = 3.0
# Numbers that are summed at once: what the exchange needs beside the tensor is small.
_PIECE = 2**24
_COUNT, _WORD = "halve/failures", "halve/first-failure"
_GO_ON = (
    "Start the same command again, with as many processes as you like: it goes on "
    "where it stopped."
)


class _CutOffError(DistributedError):
    """Another process is gone; it may have left word."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    All of them must call the same verbs in the same order.

    Attributes:
        rank: Its number.
        size: How many there are.
        local: Its number on this machine.
        local_size: How many there are on this machine.
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
        """Return a device's name, with the GPU that is this process's own.

        Raises:
            RanksError: There are too few GPUs, or all are to use one.
        """
        kind, _, index = name.partition(":")
        wants_gpu = kind in ("auto", "cuda") and torch.cuda.is_available()
        if self.size == 1 or not wants_gpu:
            return name
        gpus = 1 if index else torch.cuda.device_count()
        if self.local_size > gpus:
            raise DistributedError(
                f"{self.local_size} processes need a GPU each, and --device {name} "
                f"means {gpus} here.",
                "Start one process for each GPU, with --device cuda, or use the CPU.",
            )
        return f"cuda:{self.local}"

    def my_indices(self, count: int, together: int = 1) -> list[int]:
        """Return which of so many things are this process's.

        They are dealt out in turn, so many of them together.
        """
        return [i for i in range(count) if i // together % self.size == self.rank]

    def assign(self, costs: Sequence[float]) -> list[int]:
        """Return who does each piece of work, the same everywhere.

        The costliest is given away first, each to who has least to do so far; of
        equals to the last, since the first writes files besides.
        """
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owner = min(reversed(range(self.size)), key=loads.__getitem__)
            loads[owner] += costs[index]
            owners[index] = owner
        return owners

    def broadcast_object(self, make: Callable[[], T], source: int = 0) -> T:
        """Return everywhere what one process makes; it must be picklable."""
        if self.size == 1:
            return make()
        own = [make() if self.rank == source else None]
        with _talking():
            dist.broadcast_object_list(own, source, device=torch.device("cpu"))
        return cast("T", own[0])

    def broadcast_tensors(
        self, tensors: dict[str, Tensor] | None, source: int = 0
    ) -> dict[str, Tensor]:
        """Return everywhere the tensors of one process; the others give None."""
        if self.size == 1:
            return tensors or {}
        own = {name: t.contiguous() for name, t in (tensors or {}).items()}
        kinds = self.broadcast_object(
            lambda: {n: (t.shape, t.dtype, t.device.type) for n, t in own.items()},
            source,
        )
        for name, (shape, dtype, device) in kinds.items():
            if self.rank != source:
                own[name] = torch.empty(shape, dtype=dtype, device=device)
            self.broadcast_(own[name], source)
        return own

    def broadcast_(self, tensor: Tensor, source: int = 0) -> None:
        """Replace a tensor, in one piece, by that of one process."""
        if self.size > 1:
            bits = tensor.view(-1).view(torch.uint8)
            with _talking():
                dist.broadcast(bits, source)

    def all_gather_tensors(
        self, tensors: Sequence[Tensor], wanted: bool
    ) -> list[Tensor]:
        """Return what all processes give, in their order; nothing where not wanted."""
        found: list[Tensor] = []
        for source in range(self.size):
            own = dict(zip(map(str, range(len(tensors))), tensors, strict=True))
            theirs = self.broadcast_tensors(
                own if source == self.rank else None, source
            )
            found += theirs.values() if wanted else ()
        return found

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace a tensor, in one piece, by its sum over all processes."""
        if self.size > 1:
            pieces = tensor.view(-1).split(_PIECE)
            with _talking():
                for piece in pieces:
                    dist.all_reduce(piece)

    def all_sum(self, *values: float) -> tuple[float, ...]:
        """Return sums over all processes, with the same bits in each."""
        if self.size == 1:
            return values
        return tuple(map(math.fsum, zip(*self.all_gather(values), strict=True)))

    def all_gather(self, value: T) -> list[T]:
        """Return what all processes give, in their order; it must be picklable."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        with _talking():
            dist.all_gather_object(found, value)
        return found


SINGLE_PROCESS = Ranks()


@contextmanager
def join() -> Iterator[Ranks]:
    """Join the processes that torchrun has started; alone where it started just one.

    What fails in one of them fails in all.

    Raises:
        HalveError: What was raised within, here or in another process; rank 0 always
            says it, and the one where it happened.
        ToldError: The others do not say it again.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not dist.is_torchelastic_launched():
        yield SINGLE_PROCESS
        return
    ranks, store = _connect()
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield ranks
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # we are on our way out
        answer = _answer(error, ranks, store)
        if answer is error:
            raise
        raise answer from error
    else:
        signal.signal(signal.SIGTERM, before)
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
            timeout=_PATIENCE,
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"Process {ranks.rank} of {ranks.size} found no connection to the others "
            f"({_in_short(error)}).",
            "Check torchrun's addresses and ports, and GLOO_SOCKET_IFNAME.",
        ) from error
    return ranks, store


@contextmanager
def _talking() -> Iterator[None]:
    """Explain why processes cannot talk to each other any more."""
    try:
        yield
    except RuntimeError as error:
        raise _CutOffError(
            "Another process of this run has ended without a word, as one does that "
            f"is killed for want of memory ({_in_short(error)}).",
            _GO_ON,
        ) from error


def _stop(signal_: int, frame: FrameType | None) -> None:
    raise _CutOffError(
        "This process was told to stop, as torchrun does when another one of the run "
        "has ended without a word.",
        _GO_ON,
    )


def _answer(error: BaseException, ranks: Ranks, store: Store) -> BaseException:
    """Return what to raise for an error: what was the first to go wrong anywhere."""
    own = error
    if not isinstance(error, HalveError):
        own = DistributedError(
            f"Process {ranks.rank} of this run failed ({_in_short(error)}).", _GO_ON
        )
    assert isinstance(own, HalveError)
    first = _first_word(store, own)
    if first is own:
        return error
    return (
        first if ranks.is_main_process else ReportedError(first.problem, first.remedy)
    )


def _first_word(store: Store, own: HalveError) -> HalveError:
    """Leave word of an error, unless another process has; return who was first."""
    # The store goes with torchrun, and says so by RuntimeErrors of its own.
    with suppress(RuntimeError):
        until = time.monotonic() + _WORD_COMES
        while isinstance(own, _CutOffError) and time.monotonic() < until:
            if store.check([_WORD]):
                break
            time.sleep(0.1)
        if store.add(_COUNT, 1) > 1:
            return pickle.loads(store.get(_WORD))
        store.set(_WORD, pickle.dumps(own))  # pyright: ignore[reportArgumentType]
    return own


def _in_short(error: BaseException) -> str:
    reason = " ".join(str(error).split())[:160].rstrip(". ")
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__
