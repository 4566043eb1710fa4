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
from halve.errors import NumericalError, UnsupportedModelError
from halve.models import CapturedCalls, capture_calls, run_tail
from halve.numerics.finite import finite_flag, is_finite
from halve.numerics.matmul import FastMatmul
from halve.numerics.precision import matmul_precision
from halve.runtime.blockwise_model import (
    BATCH_TOKENS,
    BlockwiseModel,
    activation_nbytes,
    max_batch_tokens,
    windows_per_batch,
)
from halve.runtime.experts_in_turn import experts_in_turn
from halve.runtime.hidden_states import SideCopies, copies_beside, place_hidden


class _Called(Exception):  # noqa: N818  (control flow, no error)
    """Stops a forward pass at the call of a module."""


# The sample that is run to see which modules of a block are called, and with what.
_FIRST = slice(0, 1)
# Logits in one batch: 256 MiB of float32.
_BATCH_LOGITS = 2**26
# Tokens whose logits are in memory at a time while gradients are computed, and numbers
# for each logit: itself, its logarithm, their gradients, and what tokens are drawn by.
GRADIENT_TOKENS, GRADIENT_COPIES = 256, 5


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
                    stream.axis = _sample_axis(model, ids, states)
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
        return self._slices(self.model.batch(self.windows.shape[1]))

    def steps(self) -> Iterator[slice]:
        """Yield the slices of which each is a step of block reconstruction.

        All processes together have a batch of at most 1024 tokens: on any device Adam
        takes as many steps.
        """
        tokens = min(self.model.batch_tokens, BATCH_TOKENS)
        batch = windows_per_batch(self.windows.shape[1], tokens)
        return self._slices(max(batch // self.ranks.size, 1))

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

    def _slices(self, size: int) -> Iterator[slice]:
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

    @torch.no_grad()
    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """Run everything after the last block, batch by batch.

        Yields:
            A slice of samples, and their logits, [batch, length, vocabulary], on the
            device.
        """
        size = self.model.meta_model.config.get_text_config().vocab_size
        with self.model.surroundings(with_head=True):
            for part in self._slices(_logits_batch(self, size)):
                yield part, self._logits(part)

    def prediction_gradient(self, seed: int = 0) -> Tensor:
        """Return the gradient of log p(y) by what leaves the last block.

        The tokens y are drawn from the model's own predictions p, one for each
        position, so that squares of gradients estimate the Fisher information.

        Args:
            seed: Of the draws.

        Returns:
            In the shape of `hidden`, float32, on its device.
        """
        gradient = torch.empty_like(self.hidden)
        with self.model.surroundings(with_head=True), torch.enable_grad():
            for sample, ids in enumerate(self.windows):
                generator = torch.Generator().manual_seed(seed + sample)
                uniform = torch.rand(ids.shape, generator=generator)
                for tokens in self._token_slices():
                    place = (slice(sample, sample + 1), *tokens)
                    part = (ids[tokens].unsqueeze(0), self.hidden[place])
                    drawn = uniform[tokens].unsqueeze(0)
                    gradient[place] = self._gradient_of_draws(*part, drawn)
        return gradient

    def _token_slices(self) -> Iterator[tuple[slice, ...]]:
        """Yield parts of a window whose logits are in memory at a time.

        What follows the blocks treats each token alone. Where hidden states have other
        dimensions than samples, tokens and width, all of a window are one part.
        """
        length = self.windows.shape[1]
        if self.hidden.shape[1:-1] != (length,):
            yield ()
            return
        for start in range(0, length, GRADIENT_TOKENS):
            yield (slice(start, start + GRADIENT_TOKENS),)

    def _gradient_of_draws(
        self, ids: Tensor, hidden: Tensor, uniform: Tensor
    ) -> Tensor:
        """Return the gradient by hidden states of log p of tokens drawn from p.

        Args:
            ids: [1, tokens].
            hidden: What leaves the last block, samples first.
            uniform: Numbers from 0 to 1, by which tokens are drawn, [1, tokens].
        """
        hidden = hidden.to(self.model.device).requires_grad_()
        scores = self._tail(ids, hidden).float().log_softmax(-1)
        # Drawn on the CPU, so that every device draws the same.
        below = scores.detach().exp().cumsum(-1) < uniform.to(scores.device)[..., None]
        drawn = below.sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        scores.gather(-1, drawn).sum().backward()
        assert hidden.grad is not None, "predictions depend on hidden states"
        return hidden.grad

    def _logits(self, part: slice) -> Tensor:
        return self._tail(self.windows[part], self.hidden[part])

    def _tail(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits of tokens, given what leaves the last block for them."""
        hidden = hidden.to(self.model.device).movedim(0, self.axis)
        captured = next(iter(self.captured.values()))
        with FastMatmul(), self.model.running():
            ids = ids.to(self.model.device)
            return run_tail(self.model.meta_model, ids, hidden, captured)


def _sample_axis(model: BlockwiseModel, ids: Tensor, states: Tensor) -> int:
    """Return the dimension of a model's hidden states that counts the samples.

    Args:
        model: The model, with everything but its blocks in memory.
        ids: One sample, [1, length].
        states: The hidden states that enter the first block for it.

    Raises:
        UnsupportedModelError: There is none.
    """
    usual = 3  # [batch, length, width]
    if states.dim() == usual and states.shape[:2] == ids.shape:
        return 0
    # Gemma 3n has [4, batch, length, width]: two samples show which one it is.
    with model.running():
        twice, _ = capture_calls(model.meta_model, ids.repeat(2, 1))
    shapes = zip(states.shape, twice.shape, strict=False)
    axes = [axis for axis, (one, two) in enumerate(shapes) if one != two]
    if len(axes) == 1 and (states.shape[axes[0]], twice.shape[axes[0]]) == (1, 2):
        return axes[0]
    raise UnsupportedModelError(
        f"The hidden states of {type(model.meta_model.model).__name__} have the shape "
        f"{list(states.shape)}, in which no dimension counts the samples.",
        "Open an issue that names the model.",
    )


def checks_later(device: torch.device) -> bool:
    """Whether results are checked at the end of a pass, and not batch by batch.

    Each check waits for the device. A GPU would have nothing to do afterwards until the
    next kernels are launched.
    """
    return device.type == "cuda"


@torch.no_grad()
def held_out_logits(first: Stream, second: Stream) -> Iterator[tuple[Tensor, Tensor]]:
    """Run everything after the last block for the held-out windows of two streams.

    Args:
        first: A stream that has been advanced past the last block.
        second: Another one of the same model, with as many held-out windows.

    Yields:
        The logits of both for one batch, [batch, length, vocabulary] each, on the
        device.
    """
    model = first.model
    size = model.meta_model.config.get_text_config().vocab_size
    # The logits of both streams are in memory together, so each has half a batch.
    batch = max(_logits_batch(first, size) // 2, 1)
    parts = (
        [part for part in s._slices(batch) if s.is_held_out(part)]
        for s in (first, second)
    )
    with model.surroundings(with_head=True):
        for one, other in zip(*parts, strict=True):
            yield first._logits(one), second._logits(other)


def _logits_batch(stream: Stream, vocabulary: int) -> int:
    """Return the number of windows whose logits are computed at once."""
    # Reduced as the batch is, when memory was exhausted.
    model = stream.model
    fraction = model.batch_tokens / max_batch_tokens(model.device)
    window = vocabulary * stream.windows.shape[1]
    return max(int(_BATCH_LOGITS * fraction) // window, 1)


def _my_windows(count: int, batch: int, ranks: Ranks) -> list[int]:
    """Return the indices of this process's windows among `count` of them.

    Windows are assigned in whole batches, or in smaller pieces where there are fewer
    batches than processes.
    """
    return ranks.my_indices(count, max(min(batch, count // ranks.size), 1))
