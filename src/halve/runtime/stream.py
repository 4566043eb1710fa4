"""The hidden states of a set of windows, advanced through a model block by block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halve.distributed import SINGLE_PROCESS, Ranks
from halve.errors import NumericalError
from halve.models import CapturedCalls, capture_calls, sample_axis
from halve.numerics.finite import finite_flag, is_finite
from halve.numerics.matmul import FastMatmul
from halve.numerics.precision import matmul_precision
from halve.runtime.batch_size import BATCH_TOKENS, activation_nbytes, windows_per_batch
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.experts_in_turn import experts_in_turn
from halve.runtime.hidden_states import SideCopies, copies_beside, place_hidden


class _Called(Exception):  # noqa: N818  (control flow, no error)
    """Stops a forward pass at the call of a module."""


# The sample that is run to see which modules of a block are called, and with what.
_FIRST = slice(0, 1)


@dataclass
class Stream:
    """The hidden states of windows between two blocks of a model.

    In a run of several processes, each has a stream of its part of the windows.

    Attributes:
        model: The model that the windows are run through.
        windows: Token ids, [samples, length], int64.
        held_out: The number of windows, at the end, that are held out for validation.
            No batch mixes them with the others.
        ranks: The processes of the run.
        numbers: The index of each window among those of all processes.
        all_held_out: The number of held-out windows of all processes.
        hidden: Hidden states, [samples, length, width], float32, on the CPU, or on the
            GPU where they fit (`place_hidden`); overwritten by each block. A model may
            have other dimensions than length and width; samples come first in any case.
        axis: The dimension of the samples in the model's own hidden states.
        captured: The calls of the blocks, by (size of batch, first sample). The first
            sample is None in the entry that serves all batches of that size; batches
            that are called differently have entries of their own.
    """

    model: BlockwiseModel
    windows: Tensor
    held_out: int = 0
    ranks: Ranks = SINGLE_PROCESS
    numbers: Sequence[int] = ()
    all_held_out: int = 0
    hidden: Tensor = field(init=False)
    axis: int = field(init=False, default=0)
    captured: dict[tuple[int, int | None], CapturedCalls] = field(
        init=False, default_factory=dict
    )
    _copies: SideCopies | None = field(init=False, default=None)

    @staticmethod
    def nbytes(tokens: int, width: int) -> int:
        """Return the bytes of the hidden states of so many tokens."""
        return 4 * tokens * width

    @staticmethod
    def batch_nbytes(tokens: int, width: int, inner: int) -> int:
        """Return the bytes of activations of a batch; see `activation_nbytes`."""
        return activation_nbytes(tokens, width, inner)

    @classmethod
    @torch.no_grad()
    def start(
        cls,
        model: BlockwiseModel,
        windows: Tensor,
        budget: int,
        folder: Path | None = None,
        held_out: int = 0,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> "Stream":
        """Run the model up to its first block.

        Args:
            model: The model.
            windows: The windows of all processes, [samples, length], int64.
            budget: Bytes of hidden states to hold in memory; larger ones are spilled to
                a memory-mapped file.
            folder: The folder of that file.
            held_out: The number of windows, at the end, to hold out.
            ranks: The processes that divide the windows among them. There must be one
                window for each that is not held out, or one in all if all are.

        Raises:
            CalibrationError: The windows are longer than the model supports.
        """
        model.meta_model.check_length(windows.shape[1])
        training, batch = len(windows) - held_out, model.batch(windows.shape[1])
        validation = [training + i for i in _my_windows(held_out, batch, ranks)]
        numbers = [*_my_windows(training, batch, ranks), *validation]
        windows = windows[numbers]
        stream = cls(model, windows, len(validation), ranks, numbers, held_out)
        # Batches of these sizes are run as well, and need captured calls.
        batches = list(stream.batches())
        steps = [part for part in stream.steps() if part not in batches]
        with model.surroundings(with_head=False), FastMatmul():
            for part in (_FIRST, *batches, *steps):
                ids = windows[part].to(model.device)
                with model.running():
                    states, captured = capture_calls(model.meta_model, ids)
                if part is _FIRST:
                    with model.running():
                        stream.axis = sample_axis(model.meta_model, ids, states)
                    one = states.movedim(stream.axis, 0)
                    shape = (len(windows), *one.shape[1:])
                    stream.hidden = place_hidden(model, shape, budget, folder)
                stream.hidden[part] = states.movedim(stream.axis, 0)
                stream._remember(part, captured)
        return stream

    def fork(self, budget: int, folder: Path | None = None) -> "Stream":
        """Return a copy of the stream, which can be advanced independently."""
        twin = replace(self)
        shape = tuple(self.hidden.shape)
        twin.hidden = place_hidden(self.model, shape, budget, folder)
        twin.hidden.copy_(self.hidden)
        twin.axis = self.axis
        twin.captured = self.captured
        return twin

    def batches(self) -> Iterator[slice]:
        """Yield the slices of samples that are run together.

        Training windows come first, then those held out; the last slice of each may be
        smaller. Batches do not depend on the number of processes.
        """
        return self.slices(self.model.batch(self.windows.shape[1]))

    def steps(self) -> Iterator[slice]:
        """Yield the slices of which each is a step of block reconstruction.

        All processes together have a batch of at most 1024 tokens: on any device Adam
        takes as many steps.
        """
        tokens = min(self.model.batch_tokens, BATCH_TOKENS)
        batch = windows_per_batch(self.windows.shape[1], tokens)
        return self.slices(max(batch // self.ranks.size, 1))

    def compared(self) -> slice:
        """Return the samples on which outputs before and after pruning are compared.

        They are the first batch, or the first step where batches are larger.
        """
        is_large = self.model.batch_tokens > BATCH_TOKENS
        return next(self.steps() if is_large else self.batches())

    def one_pass(self) -> Iterator[slice]:
        """Yield the slices of `batches`, each of which is run at most once meanwhile.

        Where hidden states are not on the GPU, those of the next batch are copied to it
        while one is run.
        """
        parts = list(self.batches())
        if not parts or not copies_beside(self.hidden, self.model.device):
            yield from parts
            return
        largest = max(part.stop - part.start for part in parts)
        self._copies = copies = SideCopies(self.hidden, self.model.device, largest)
        try:
            copies.start(parts[0])
            for part, following in zip_longest(parts, parts[1:]):
                if following is not None:
                    copies.start(following)
                yield part
        finally:
            copies.finish()
            self._copies = None

    def slices(self, size: int) -> Iterator[slice]:
        """Yield slices of at most so many samples, in the order of `batches`."""
        samples = len(self.windows)
        training = samples - self.held_out
        for first, last in ((0, training), (training, samples)):
            for start in range(first, last, size):
                yield slice(start, min(start + size, last))

    def is_held_out(self, part: slice) -> bool:
        """Whether a batch consists of held-out windows."""
        return part.start >= len(self.windows) - self.held_out

    def _remember(self, part: slice, captured: CapturedCalls) -> None:
        """Store the calls of a batch, once for all batches of its size if equal."""
        size = part.stop - part.start
        shared = self.captured.setdefault((size, None), captured)
        if shared is not captured and not shared.same_as(captured):
            self.captured[size, part.start] = captured

    def _calls(self, part: slice) -> CapturedCalls:
        size = part.stop - part.start
        specific = self.captured.get((size, part.start))
        return specific or self.captured[size, None]

    @torch.no_grad()
    def run_first(self, block: nn.Module, index: int) -> Tensor:
        """Run a block on the first sample alone; return its output, on the device."""
        return self.run(block, index, _FIRST)

    def run(
        self, block: nn.Module, index: int, part: slice, hidden: Tensor | None = None
    ) -> Tensor:
        """Run a block on one batch of hidden states; return its output, on the device.

        Args:
            block: The block, with its weights.
            index: Its index in the model.
            part: The batch.
            hidden: What enters the block, samples first; by default the stream's.

        Returns:
            Samples first; differentiable if gradients are enabled.
        """
        call = self._calls(part).calls[index]
        with self.computing():
            entering = self._load(part) if hidden is None else hidden
            entering = entering.to(self.model.device).movedim(0, self.axis)
            return call.replay(block, entering).movedim(self.axis, 0)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute what belongs to a block as `run` does."""
        precision = matmul_precision(self.model.matmul_precision, self.model.device)
        with FastMatmul(), precision, self.model.running():
            yield

    def _load(self, part: slice) -> Tensor:
        """Return the hidden states of a batch, on the device."""
        loaded = None if self._copies is None else self._copies.take(part)
        return self.hidden[part].to(self.model.device) if loaded is None else loaded

    def _store(self, part: slice, states: Tensor) -> None:
        """Replace the hidden states of a batch."""
        if self._copies is None:
            self.hidden[part] = states
        else:
            self._copies.put(part, states)

    @torch.no_grad()
    def call_of(
        self, block: nn.Module, index: int, path: str, part: slice
    ) -> tuple[Any, ...]:
        """Run a batch up to the call of a module; return its positional arguments.

        Args:
            block: The block, with its weights.
            index: Its index in the model.
            path: Path of the module within the block.
            part: The batch.
        """
        calls: list[tuple[Any, ...]] = []

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            calls.append(args)
            raise _Called

        handle = block.get_submodule(path).register_forward_pre_hook(note)
        try:
            self.run(block, index, part)
        except _Called:
            return calls[0]
        finally:
            handle.remove()
        return ()

    @torch.no_grad()
    def advance(
        self,
        block: nn.Module,
        index: int,
        watch: Callable[[slice, Tensor], None] | None = None,
    ) -> None:
        """Replace the hidden states by the output of a block.

        Where experts are spilled, they run one after the other (`experts_in_turn`).

        Args:
            block: The block, with its weights.
            index: Its index in the model.
            watch: Called with each batch and the block's output for it, on the device.

        Raises:
            NumericalError: An output is not finite; the message names block and sample.
        """
        flags: list[Tensor] = []
        with experts_in_turn(self, block, index):
            for part in self.one_pass():
                states = self.run(block, index, part)
                if checks_later(self.model.device):
                    flags.append(finite_flag(states))
                elif not is_finite(states):
                    raise self._not_finite(states, index, part)
                if watch:
                    watch(part, states)
                self._store(part, states)
        self._check_flags(flags, index)

    def _check_flags(self, flags: list[Tensor], index: int) -> None:
        """Check the flags of all batches of a pass, waiting for the device once."""
        if not flags:
            return
        are_finite = torch.stack(flags).tolist()
        for part, finite in zip(self.batches(), are_finite, strict=True):
            if not finite:
                raise self._not_finite(self.hidden[part], index, part)

    def _not_finite(self, states: Tensor, index: int, part: slice) -> NumericalError:
        bad = (~states.isfinite()).flatten(1).any(dim=1).nonzero()[0].item()
        return NumericalError(
            f"Block {self.model.block_name(index)} outputs NaN or infinity for sample "
            f"{self.numbers[part.start + int(bad)]}.",
            "Check the checkpoint and the text; a model that overflows in float32 "
            "cannot be pruned or evaluated.",
        )


def checks_later(device: torch.device) -> bool:
    """Whether results are checked at the end of a pass, and not batch by batch.

    Each check waits for the device. A GPU would have nothing to do afterwards until the
    next kernels are launched.
    """
    return device.type == "cuda"


def _my_windows(count: int, batch: int, ranks: Ranks) -> list[int]:
    """Return the indices of this process's windows among `count` of them.

    Windows are assigned in whole batches, or in smaller pieces where there are fewer
    batches than processes.
    """
    return ranks.my_indices(count, max(min(batch, count // ranks.size), 1))
