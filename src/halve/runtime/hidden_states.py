"""Where hidden states and cached inputs are stored, and how they reach a GPU.

On a GPU they stay in its memory while they fit. Otherwise they are in page-locked
memory of the host, and copied on a stream of their own: while a batch is computed, the
next one arrives and the last one leaves. What exceeds the memory for activations is in
a memory-mapped file, and copied when it is needed, as on the CPU.
"""

from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from halve.calibration import allocate_hidden
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.memory_left import free_gpu_nbytes


def place_hidden(
    model: BlockwiseModel,
    shape: tuple[int, ...],
    budget: int,
    folder: Path | None = None,
) -> Tensor:
    """Allocate an uninitialised float32 tensor for hidden states, or for inputs.

    Args:
        model: The model that computes them.
        shape: [samples, length, width], or as many dimensions as the model has.
        budget: The number of bytes up to which the tensor is in the host's memory if it
            is not on the GPU.
        folder: See `allocate_hidden`.

    Returns:
        The tensor, on the GPU or on the CPU.

    Raises:
        OutputError: The disk has no space for a memory-mapped file.
    """
    nbytes = 4 * prod(shape)
    if _fits_gpu(model, nbytes):
        return torch.empty(shape, device=model.device)
    if model.device.type == "cuda" and pinned_nbytes(nbytes) <= budget:
        try:
            return torch.empty(shape, pin_memory=True)
        except RuntimeError:  # the system locks no more pages
            pass
    return allocate_hidden(shape, budget, folder)


def _fits_gpu(model: BlockwiseModel, nbytes: int) -> bool:
    """Whether so many bytes leave the model's reserve of its GPU's memory free."""
    if model.reserve is None:
        return False
    return nbytes + model.reserve <= free_gpu_nbytes(model.device)


def pinned_nbytes(nbytes: int) -> int:
    """Return the page-locked memory that torch takes for so many bytes.

    It allocates powers of two.
    """
    return 1 << max(nbytes - 1, 0).bit_length()


# The tensor on the GPU that a copy reads or writes, and the event behind the copy.
_Copy = tuple[Tensor, torch.cuda.Event | None]


class SideCopies:
    """Copies between hidden states in the host's memory and a GPU, beside its work.

    There are two buffers on the GPU. While the batch in one of them is computed, the
    next one is copied into the other, and the states of the batch before are copied
    back. All copies are made on one CUDA stream, one after the other. On another device
    they are made at once, so that the order of the calls can be tested.
    """

    def __init__(self, hidden: Tensor, device: torch.device, samples: int) -> None:
        """Allocate the buffers.

        Args:
            hidden: [samples, length, width], on the CPU, page-locked for CUDA.
            device: Where batches are computed.
            samples: Samples in the largest batch.
        """
        self._hidden, self._device = hidden, device
        shape = (2, min(samples, len(hidden)), *hidden.shape[1:])
        self._halves = torch.empty(shape, device=device)
        self._turn = 0
        self._arriving: dict[tuple[int, int], _Copy] = {}
        self._leaving: _Copy | None = None
        on_gpu = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if on_gpu else None

    def start(self, part: slice) -> None:
        """Begin to copy a batch to the GPU.

        It overwrites the batch that was started two calls earlier, whose computation
        must have been queued.
        """
        buffer = self._halves[self._turn][: part.stop - part.start]
        self._turn = 1 - self._turn
        with self._beside():
            buffer.copy_(self._hidden[part], non_blocking=True)
            self._arriving[part.start, part.stop] = buffer, self._mark()

    def take(self, part: slice) -> Tensor | None:
        """Return a batch on the GPU; None if it was not started, or taken before."""
        buffer, arrived = self._arriving.pop((part.start, part.stop), (None, None))
        self._wait(arrived)
        return buffer

    def put(self, part: slice, states: Tensor) -> None:
        """Begin to copy the states of a batch back."""
        with self._beside():
            self._hidden[part].copy_(states, non_blocking=True)
            left = self._mark()
        # The states of the batch before are held until they have left: from here on
        # their memory is given to other tensors of the stream that computes.
        if self._leaving is not None:
            self._wait(self._leaving[1])
        self._leaving = states, left

    def finish(self) -> None:
        """Wait until all copies are made."""
        if self._side is not None:
            self._side.synchronize()
        self._arriving.clear()
        self._leaving = None

    def _beside(self) -> AbstractContextManager[object]:
        """Make copies after all that has been queued so far, beside what follows."""
        if self._side is None:
            return nullcontext()
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._side)

    def _mark(self) -> torch.cuda.Event | None:
        """Return an event behind the copies made so far."""
        if self._side is None:
            return None
        event = torch.cuda.Event()
        event.record(self._side)
        return event

    def _wait(self, event: torch.cuda.Event | None) -> None:
        """Let what is queued from here on wait for copies."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


def copies_beside(hidden: Tensor, device: torch.device) -> bool:
    """Whether hidden states are copied by `SideCopies`."""
    return device.type == "cuda" and hidden.device.type == "cpu" and hidden.is_pinned()
