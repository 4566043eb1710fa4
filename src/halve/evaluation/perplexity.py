"""Perplexity by the protocol of the SparseGPT paper, and divergence between two models.

The text is joined and cut into segments that do not overlap; the perplexity is exp of
the mean over segments of a segment's mean loss (Frantar and Alistarh, 2023, appendix).
Perplexities of different sequence lengths are not comparable, so every record states
its length. Models run block by block, so they need not fit into memory.

The paper's segments have no BOS token. A model that was trained with one reads it
before every segment (`EvalOptions.bos`); what it predicts is the same.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from halve.calibration import (
    ChatTemplate,
    Segments,
    check_vocabulary,
    cut_segments,
    default_activation_memory,
    load_corpus,
    load_encoder,
)
from halve.checkpoint import resolve_model
from halve.errors import CalibrationError, NumericalError
from halve.evaluation.divergence import summarize
from halve.options import EvalOptions
from halve.records import ComparisonRecord, PerplexityRecord, Progress
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.oom_backoff import with_smaller_batches
from halve.runtime.predictions import all_logits
from halve.runtime.stream import Stream

# Phases of progress: which of two models is run.
MODEL, REFERENCE = "model", "reference"


def evaluate(model: str | Path, options: EvalOptions) -> PerplexityRecord:
    """Measure a model's perplexity; see `halve.perplexity` for the contract."""
    options.check()
    started = time.perf_counter()
    opened = _open(model, options)
    segments = evaluation_segments(opened, options)

    def measure(opened: BlockwiseModel) -> Tensor:
        batches = all_logits(run_blocks(opened, segments.ids, options, MODEL))
        return torch.cat(
            [_losses(logits, segments.part(part)) for part, logits in batches]
        )

    losses = with_smaller_batches(opened, segments.ids.shape[1], measure)
    return _record(losses, segments, options, started)


def check_text(model: str | Path, options: EvalOptions) -> None:
    """Raise what `evaluate` would raise for the text; read one segment and no weights.

    Raises:
        HalveError: The text, the model or its tokenizer cannot be read.
        CalibrationError: The text has no complete segment.
    """
    evaluation_segments(_open(model, options), replace(options, segments=1))


def compare(
    model: str | Path, reference: str | Path, options: EvalOptions
) -> ComparisonRecord:
    """Run two models over the same segments; see `halve.compare` for the contract."""
    options.check()
    started = time.perf_counter()
    pair, segments = open_pair(model, reference, options)

    def measure(first: BlockwiseModel) -> _Differences:
        second = replace(pair[1], batch_tokens=first.batch_tokens)
        streams = [
            run_blocks(opened, segments.ids, options, name)
            for opened, name in ((first, MODEL), (second, REFERENCE))
        ]
        differences = _Differences([], [], [], [])
        for (part, logits), (_, reference_logits) in _paired_logits(*streams):
            differences.add(logits, reference_logits, segments.part(part))
        return differences

    differences = with_smaller_batches(pair[0], segments.ids.shape[1], measure)
    return ComparisonRecord(
        model=_record(torch.cat(differences.losses), segments, options, started),
        reference=_record(
            torch.cat(differences.reference_losses), segments, options, started
        ),
        **summarize(differences.divergences, differences.agreements),
    )


def open_pair(
    model: str | Path, reference: str | Path, options: EvalOptions
) -> tuple[list[BlockwiseModel], Segments]:
    """Open two models, and cut the text into segments for both.

    Raises:
        CalibrationError: Their segments differ.
    """
    pair = [_open(name, options) for name in (model, reference)]
    segments, other = (evaluation_segments(opened, options) for opened in pair)
    if not torch.equal(segments.ids, other.ids):
        raise CalibrationError(
            f"{model} and {reference} do not split the text into the same tokens.",
            "Compare models that have the same tokenizer, and set seq_len if their "
            "maximum lengths differ (--seq-len).",
        )
    return pair, segments


def _paired_logits(
    first: Stream, second: Stream
) -> Iterator[tuple[tuple[slice, Tensor], tuple[slice, Tensor]]]:
    """Yield the logits of both models, batch by batch; the batches are the same."""
    return zip(all_logits(first), all_logits(second), strict=True)


@dataclass(frozen=True)
class _Differences:
    """Results per segment and token, so that logits need not be stored.

    Attributes:
        losses: Mean losses of the model, [segments] in each batch, float64.
        reference_losses: The same of the reference.
        divergences: KL(reference || model) in nats, [length - 1] for each segment.
        agreements: Whether both predict the same most likely token, [length - 1] for
            each segment.
    """

    losses: list[Tensor]
    reference_losses: list[Tensor]
    divergences: list[Tensor]
    agreements: list[Tensor]

    def add(self, logits: Tensor, reference: Tensor, segments: Segments) -> None:
        """Add a batch.

        Args:
            logits: Logits of the model, [segments, length, vocabulary].
            reference: Logits of the reference, in the same shape.
            segments: The segments that both have read.
        """
        self.losses.append(_losses(logits, segments))
        self.reference_losses.append(_losses(reference, segments))
        both = (segments.predictions(scores) for scores in (logits, reference))
        # One segment at a time, because its log-probabilities take as much memory as
        # its logits again.
        for pruned, dense in zip(*both, strict=True):
            # KL(p || q) = sum over the vocabulary of p (log p - log q); p: reference.
            log_p, log_q = dense.log_softmax(-1), pruned.log_softmax(-1)
            self.divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
            self.agreements.append((pruned.argmax(-1) == dense.argmax(-1)).cpu())


def _open(model: str | Path, options: EvalOptions) -> BlockwiseModel:
    folder = resolve_model(model)
    return BlockwiseModel.open(folder, options.device, options.trust_remote_code)


def evaluation_segments(opened: BlockwiseModel, options: EvalOptions) -> Segments:
    """Read a text, and cut it into the segments on which a model is evaluated.

    Args:
        opened: The model, whose tokenizer is used; no weights are read.
        options: Text, length and number of segments, and whether BOS precedes each.

    Raises:
        CalibrationError: The text has no complete segment, or its tokens are not the
            model's.
    """
    default = opened.meta_model.default_length
    length = default if options.seq_len is None else options.seq_len
    opened.meta_model.check_length(length)
    if length < 2:  # noqa: PLR2004  (the first token of a segment is not predicted)
        raise CalibrationError(
            f"seq_len is {length}, which leaves no token to predict.",
            "Set seq_len to 2 or more (--seq-len).",
        )
    adds_bos = options.bos == "auto" and not opened.meta_model.is_of_the_papers
    folder = opened.checkpoint.folder
    encode = load_encoder(folder, options.trust_remote_code, adds_bos)
    render = ChatTemplate(folder, options.trust_remote_code)
    corpus = load_corpus(options.data, "evaluation", render)
    segments = cut_segments(corpus, encode, length, options.segments)
    check_vocabulary(segments.ids, opened.meta_model.vocabulary)
    return segments


def run_blocks(
    opened: BlockwiseModel, windows: Tensor, options: EvalOptions, name: str
) -> Stream:
    """Return the hidden states of all segments after the last block.

    Args:
        opened: The model.
        windows: Token ids, [segments, length].
        options: Memory, and what is told of progress.
        name: Which of two models it is, `MODEL` or `REFERENCE`: the phase of progress.
    """
    limit = options.activation_memory
    stream = Stream.start(
        opened, windows, default_activation_memory() if limit is None else limit
    )
    for index in range(opened.depth):
        options.progress(Progress(index, opened.depth, name))
        with opened.block(index) as block:
            stream.advance(block, index)
    return stream


def _losses(logits: Tensor, segments: Segments) -> Tensor:
    """Return the mean cross-entropy of each segment in nats, [segments], float64.

    Args:
        logits: Logits, [segments, length, vocabulary].
        segments: The segments that were read.
    """
    targets = segments.targets.to(logits.device)
    losses = [
        functional.cross_entropy(predicted, target, reduction="none").double().mean()
        for predicted, target in zip(segments.predictions(logits), targets, strict=True)
    ]
    return torch.stack(losses).cpu()


def _record(
    losses: Tensor, segments: Segments, options: EvalOptions, started: float
) -> PerplexityRecord:
    if not losses.isfinite().all():
        raise NumericalError(
            "The model's loss is not finite.",
            "Check the checkpoint for weights that are NaN, infinite or too large.",
        )
    count, length = segments.ids.shape
    perplexity = float(losses.mean().exp())
    # d exp(m) = exp(m) dm, and the standard error of the mean m is std / sqrt(count).
    standard_error = float(losses.std()) / count**0.5 if count > 1 else None
    return PerplexityRecord(
        perplexity=perplexity,
        standard_error=standard_error and perplexity * standard_error,
        tokens=count * (length - 1),
        seq_len=length,
        segments=count,
        data=options.data,
        seconds=time.perf_counter() - started,
        bos=segments.bos,
        losses=tuple(losses.tolist()),
        data_sha256=hashlib.sha256(segments.ids.numpy().tobytes()).hexdigest(),
    )
