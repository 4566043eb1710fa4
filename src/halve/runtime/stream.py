"""The hidden states of a set of windows, carried through a model block by block."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from halve.calibration import allocate_hidden
from halve.distributed import SINGLE_PROCESS, Ranks
from halve.errors import NumericalError
from halve.models import CapturedCalls, capture_calls, run_tail
from halve.numerics.finite import is_finite
from halve.numerics.matmul import FastMatmul
from halve.runtime.blockwise_model import BATCH_TOKENS, BlockwiseModel

# The one sample on which the inputs of a block's modules are watched.
_FIRST = slice(0, 1)
# Logits of one batch, in numbers: 256 MiB of float32.
_BATCH_LOGITS = 2**26


@dataclass
class Stream:
    """The hidden states of windows on their way through a model.

    Where several processes share windows, each has a stream of its own ones.

    Attributes:
        model: What they go through.
        windows: Token numbers, [samples, length].
        held_out: How many windows, the last ones, are kept apart from the others: no batch
            holds both kinds.
        ranks: Who has the other windows.
        numbers: Which of all windows these are.
        all_held_out: How many windows all processes keep apart.
        hidden: States between two blocks, [samples, length, width], overwritten by
            each block.
        captured: How blocks are called: for each size of batch where all batches are
            called alike, else for each batch (by its first sample).
    """

    model: BlockwiseModel
    windows: Tensor
    held_out: int = 0
    ranks: Ranks = SINGLE_PROCESS
    numbers: Sequence[int] = ()
    all_held_out: int = 0
    hidden: Tensor = field(init=False)
    captured: dict[tuple[int, int | None], CapturedCalls] = field(
        init=False, default_factory=dict
    )

    @staticmethod
    def nbytes(tokens: int, width: int) -> int:
        """Return the bytes of the hidden states of so many tokens."""
        return 4 * tokens * width

    @staticmethod
    def batch_nbytes(tokens: int, width: int, inner: int) -> int:
        """Return the bytes of activations while a batch runs through a block.

        Eight tensors are counted that are as wide as hidden states, such as the stream
        before and after the block, the output of a norm, queries, keys, values and the
        output of the attention; and three of the inner width: the inner activations of
        the feed-forward network before and after its function, or attention scores.

        Args:
            tokens: Tokens in the batch.
            width: Width of hidden states.
            inner: Numbers for each token in the widest activation within the block.
        """
        return 4 * tokens * (8 * width + 3 * inner)

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
            windows: [samples, length], int64: those of all processes.
            budget: Bytes of hidden states that may live in memory.
            folder: Where a mapped file lies past that.
            held_out: How many of the windows, the last ones, are kept apart.
            ranks: Who shares them. Each process must be left one that is not apart, or
                one in all where all are.

        Raises:
            CalibrationError: Windows longer than the model can take.
        """
        model.meta_model.check_length(windows.shape[1])
        fitted, batch = len(windows) - held_out, model.batch(windows.shape[1])
        held = [fitted + number for number in _own(held_out, batch, ranks)]
        numbers = [*_own(fitted, batch, ranks), *held]
        windows = windows[numbers]
        stream = cls(model, windows, len(held), ranks, numbers, held_out)
        steps = stream.steps() if ranks.size > 1 else ()  # of other sizes
        with model.surroundings(with_head=False), FastMatmul():
            for part in (_FIRST, *stream.batches(), *steps):
                ids = windows[part].to(model.device)
                with model.running():
                    states, captured = capture_calls(model.meta_model, ids)
                if part is _FIRST:
                    samples, length = windows.shape
                    shape = (samples, length, states.shape[-1])
                    stream.hidden = allocate_hidden(shape, budget, folder)
                stream.hidden[part] = states.cpu()
                stream._note(part, captured)
        return stream

    def fork(self, budget: int, folder: Path | None = None) -> "Stream":
        """Return a second stream at the same place, to go its own way from there."""
        twin = replace(self)
        samples, length, width = self.hidden.shape
        twin.hidden = allocate_hidden((samples, length, width), budget, folder)
        twin.hidden.copy_(self.hidden)
        twin.captured = self.captured
        return twin

    def batches(self) -> Iterator[slice]:
        """Yield slices of samples, of equal size but for the last of each kind.

        However many processes share the windows, their batches are the same.
        """
        return self._slices(self.model.batch(self.windows.shape[1]))

    def steps(self) -> Iterator[slice]:
        """Yield smaller slices, where processes together take a batch at a time."""
        batch = self.model.batch(self.windows.shape[1])
        return self._slices(max(batch // self.ranks.size, 1))

    def _slices(self, size: int) -> Iterator[slice]:
        samples = len(self.windows)
        own = samples - self.held_out
        for first, last in ((0, own), (own, samples)):
            for start in range(first, last, size):
                yield slice(start, min(start + size, last))

    def is_held_out(self, part: slice) -> bool:
        """Whether a batch is of the windows kept apart."""
        return part.start >= len(self.windows) - self.held_out

    def _note(self, part: slice, captured: CapturedCalls) -> None:
        """Keep a recording once where batches of its size are all called alike."""
        size = part.stop - part.start
        shared = self.captured.setdefault((size, None), captured)
        if shared is not captured and not shared.same_as(captured):
            self.captured[size, part.start] = captured

    def _recording(self, part: slice) -> CapturedCalls:
        size = part.stop - part.start
        own = self.captured.get((size, part.start))
        return own or self.captured[size, None]

    @torch.no_grad()
    def run_first(self, block: nn.Module, index: int) -> Tensor:
        """Return what a block makes of the first sample alone."""
        return self.run(block, index, _FIRST)

    def run(self, block: nn.Module, index: int, part: slice) -> Tensor:
        """Return what a block makes of one batch of hidden states, on the device.

        Differentiable where gradients are enabled.
        """
        call = self._recording(part).calls[index]
        with FastMatmul(), self.model.running():
            return call.replay(block, self.hidden[part].to(self.model.device))

    @torch.no_grad()
    def advance(
        self,
        block: nn.Module,
        index: int,
        watch: Callable[[slice, Tensor], None] | None = None,
    ) -> None:
        """Replace the hidden states by what a block makes of them.

        Raises:
            NumericalError: They are no longer finite; names block and sample.
        """
        for part in self.batches():
            states = self.run(block, index, part)
            self._check_finite(states, index, part)
            if watch:
                watch(part, states)
            self.hidden[part] = states.cpu()

    def _check_finite(self, states: Tensor, index: int, part: slice) -> None:
        if is_finite(states):
            return
        bad = (~states.isfinite()).flatten(1).any(dim=1).nonzero()[0].item()
        raise NumericalError(
            f"Block {self.model.block_name(index)} gives NaN or infinity for sample "
            f"{self.numbers[part.start + int(bad)]}.",
            "Check the checkpoint and the text; a model that overflows in float32 "
            "cannot be pruned or judged.",
        )

    @torch.no_grad()
    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """Run everything after the last block; yield logits, batch after batch.

        Yields:
            Samples, and their logits [batch, length, vocabulary] on the device.
        """
        size = self.model.meta_model.config.get_text_config().vocab_size
        with self.model.surroundings(with_head=True):
            for part in self._slices(_logits_batch(self, size)):
                yield part, self._logits(part)

    def _logits(self, part: slice) -> Tensor:
        ids = self.windows[part].to(self.model.device)
        hidden = self.hidden[part].to(self.model.device)
        captured = next(iter(self.captured.values()))
        with FastMatmul():
            return run_tail(self.model.meta_model, ids, hidden, captured)


@torch.no_grad()
def held_out_logits(first: Stream, second: Stream) -> Iterator[tuple[Tensor, Tensor]]:
    """Run what comes after the last block for the windows that two streams keep apart.

    Args:
        first: A stream behind the last block.
        second: Another of the same model, with as many windows apart.

    Yields:
        The logits of both, [batch, length, vocabulary] on the device.
    """
    model = first.model
    size = model.meta_model.config.get_text_config().vocab_size
    # Both at once, so half of the batch each.
    batch = max(_logits_batch(first, size) // 2, 1)
    parts = (
        [part for part in s._slices(batch) if s.is_held_out(part)]
        for s in (first, second)
    )
    with model.surroundings(with_head=True):
        for one, other in zip(*parts, strict=True):
            yield first._logits(one), second._logits(other)


def _logits_batch(stream: Stream, vocabulary: int) -> int:
    """Return for how many windows logits are computed at once."""
    share = stream.model.batch_tokens / BATCH_TOKENS
    window = vocabulary * stream.windows.shape[1]
    return max(int(_BATCH_LOGITS * share) // window, 1)


def _own(count: int, batch: int, ranks: Ranks) -> list[int]:
    """Return which of so many windows a process has: whole batches, if there are any.

    Where there are fewer batches than processes, smaller pieces.
    """
    return ranks.my_indices(count, max(min(batch, count // ranks.size), 1))
