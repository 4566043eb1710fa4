"""Perplexity by the field's protocol, and how far a model's predictions moved.

The text is joined and cut into segments that do not overlap; the perplexity is exp of
the mean over segments of a segment's mean loss (Frantar and Alistarh, 2023, appendix).
Sequence lengths must agree before two figures are compared, so every record names its
own. A model is walked block by block: it need not fit into memory.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from halve.calibration import (
    check_vocabulary,
    cut_segments,
    default_activation_memory,
    load_corpus,
    load_encoder,
)
from halve.checkpoint import resolve_model
from halve.errors import CalibrationError, NumericalError
from halve.options import EvalOptions
from halve.records import ComparisonRecord, PerplexityRecord
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.oom_backoff import with_smaller_batches
from halve.runtime.stream import Stream


def evaluate(model: str | Path, options: EvalOptions) -> PerplexityRecord:
    """Return a model's perplexity; see `halve.perplexity` for the contract."""
    started = time.perf_counter()
    opened = _open(model, options)
    windows = _segments(opened, options)

    def measure(opened: BlockwiseModel) -> Tensor:
        logits = _walk(opened, windows, options).logits()
        return torch.cat([_losses(own, windows[part]) for part, own in logits])

    losses = with_smaller_batches(opened, windows.shape[1], measure)
    return _record(losses, windows, options, started)


def compare(
    model: str | Path, reference: str | Path, options: EvalOptions
) -> ComparisonRecord:
    """Walk two models side by side over the same text.

    Args:
        model: The model in question.
        reference: What it is measured against, the dense model as a rule.
        options: The text.

    Raises:
        CalibrationError: The two do not read text as the same tokens.
    """
    started = time.perf_counter()
    pair = [_open(name, options) for name in (model, reference)]
    windows, other = (_segments(opened, options) for opened in pair)
    if not torch.equal(windows, other):
        raise CalibrationError(
            f"{model} and {reference} do not cut the text into the same tokens.",
            "Compare models that share a tokenizer and pass the same --seq-len.",
        )

    def measure(first: BlockwiseModel) -> _Differences:
        second = replace(pair[1], batch_tokens=first.batch_tokens)
        streams = [_walk(opened, windows, options) for opened in (first, second)]
        found = _Differences([], [], [], [])
        for (part, ours), (_, theirs) in _together(*streams):
            found.add(ours, theirs, windows[part])
        return found

    found = with_smaller_batches(pair[0], windows.shape[1], measure)
    divergence = torch.cat(found.divergences)
    return ComparisonRecord(
        model=_record(torch.cat(found.ours), windows, options, started),
        reference=_record(torch.cat(found.theirs), windows, options, started),
        kl_mean=float(divergence.mean()),
        kl_median=float(divergence.median()),
        kl_99=float(divergence.kthvalue(-(-99 * len(divergence) // 100)).values),
        agreement=float(torch.cat(found.agreements).double().mean()),
    )


def _together(
    first: Stream, second: Stream
) -> Iterator[tuple[tuple[slice, Tensor], tuple[slice, Tensor]]]:
    return zip(first.logits(), second.logits(), strict=True)


@dataclass(frozen=True)
class _Differences:
    """What is kept of every token: four numbers instead of two vocabularies."""

    ours: list[Tensor]
    theirs: list[Tensor]
    divergences: list[Tensor]
    agreements: list[Tensor]

    def add(self, ours: Tensor, theirs: Tensor, ids: Tensor) -> None:
        self.ours.append(_losses(ours, ids))
        self.theirs.append(_losses(theirs, ids))
        # One segment at a time: two more vocabularies of log-probabilities each.
        for mine, other in zip(ours[:, :-1], theirs[:, :-1], strict=True):
            log_p, log_q = other.log_softmax(-1), mine.log_softmax(-1)
            self.divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
            self.agreements.append((mine.argmax(-1) == other.argmax(-1)).cpu())


def _open(model: str | Path, options: EvalOptions) -> BlockwiseModel:
    folder = resolve_model(model)
    return BlockwiseModel.open(folder, options.device, options.trust_remote_code)


def _segments(opened: BlockwiseModel, options: EvalOptions) -> Tensor:
    length = options.seq_len or opened.meta_model.default_length
    opened.meta_model.check_length(length)
    if length < 2:  # noqa: PLR2004  (the first token of a segment is not predicted)
        raise CalibrationError(
            f"Segments of {length} token have nothing to predict.", "Pass 2 or more."
        )
    encode = load_encoder(opened.checkpoint.folder, options.trust_remote_code)
    corpus = load_corpus(options.data, "evaluation")
    windows = cut_segments(corpus, encode, length, options.segments)
    check_vocabulary(windows, opened.meta_model.vocabulary)
    return windows


def _budget(options: EvalOptions) -> int:
    """Return the bytes of hidden states that may live in memory."""
    given = options.activation_memory
    return default_activation_memory() if given is None else given


def _walk(opened: BlockwiseModel, windows: Tensor, options: EvalOptions) -> Stream:
    stream = Stream.start(opened, windows, _budget(options))
    for index in range(opened.depth):
        options.progress(index, opened.depth)
        with opened.block(index) as block:
            stream.advance(block, index)
    return stream


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss of each segment, [segments], in float64.

    Args:
        logits: [segments, length, vocabulary].
        ids: [segments, length].
    """
    targets = ids[:, 1:].to(logits.device)
    losses = [
        functional.cross_entropy(own, target, reduction="none").double().mean()
        for own, target in zip(logits[:, :-1], targets, strict=True)
    ]
    return torch.stack(losses).cpu()


def _record(
    losses: Tensor, windows: Tensor, options: EvalOptions, started: float
) -> PerplexityRecord:
    if not losses.isfinite().all():
        raise NumericalError(
            "The model's predictions are not finite.", "Check the checkpoint."
        )
    count, length = windows.shape
    perplexity = float(losses.mean().exp())
    spread_sparsity = float(losses.std()) / count**0.5 if count > 1 else float("nan")
    return PerplexityRecord(
        perplexity=perplexity,
        standard_error=perplexity * spread_sparsity,
        tokens=count * (length - 1),
        seq_len=length,
        segments=count,
        data=options.data,
        seconds=time.perf_counter() - started,
    )
