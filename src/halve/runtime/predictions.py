"""What a model predicts for the windows of a stream, once all blocks have run."""

from collections.abc import Iterator

import torch
from torch import Tensor

from halve.models import run_tail
from halve.numerics.matmul import FastMatmul
from halve.runtime.batch_size import max_batch_tokens
from halve.runtime.stream import Stream

# Logits in one batch: 256 MiB of float32.
_BATCH_LOGITS = 2**26


@torch.no_grad()
def all_logits(stream: Stream) -> Iterator[tuple[slice, Tensor]]:
    """Run everything after the last block, batch by batch.

    Args:
        stream: A stream that has been advanced past the last block.

    Yields:
        A slice of samples, and their logits, [batch, length, vocabulary], on the
        device.
    """
    size = stream.model.meta_model.config.get_text_config().vocab_size
    with stream.model.surroundings(with_head=True):
        for part in stream.slices(_logits_batch(stream, size)):
            yield part, _logits(stream, part)


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
        [part for part in s.slices(batch) if s.is_held_out(part)]
        for s in (first, second)
    )
    with model.surroundings(with_head=True):
        for one, other in zip(*parts, strict=True):
            yield _logits(first, one), _logits(second, other)


def tail_logits(stream: Stream, ids: Tensor, hidden: Tensor) -> Tensor:
    """Return the logits of tokens, given what leaves the last block for them.

    Args:
        stream: Where the model runs.
        ids: [batch, tokens].
        hidden: What leaves the last block, samples first.
    """
    hidden = hidden.to(stream.model.device).movedim(0, stream.axis)
    captured = next(iter(stream.captured.values()))
    with FastMatmul(), stream.model.running():
        ids = ids.to(stream.model.device)
        return run_tail(stream.model.meta_model, ids, hidden, captured)


def _logits(stream: Stream, part: slice) -> Tensor:
    return tail_logits(stream, stream.windows[part], stream.hidden[part])


def _logits_batch(stream: Stream, vocabulary: int) -> int:
    """Return the number of windows whose logits are computed at once."""
    # Reduced as the batch is, when memory was exhausted.
    model = stream.model
    fraction = model.batch_tokens / max_batch_tokens(model.device)
    window = vocabulary * stream.windows.shape[1]
    return max(int(_BATCH_LOGITS * fraction) // window, 1)
