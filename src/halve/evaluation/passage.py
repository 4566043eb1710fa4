"""The predictions of two models for a passage, token by token, for reading."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from halve.calibration import Segments, TokenTexts, load_tokenizer
from halve.checkpoint import resolve_model
from halve.evaluation.perplexity import MODEL, REFERENCE, open_pair, run_blocks
from halve.models import load_config, longest_sequence
from halve.options import EvalOptions
from halve.records import PassageToken
from halve.runtime.predictions import all_logits
from halve.runtime.stream import Stream

# Tokens of the passage, and of the beginning of each later part that is a prompt.
_PASSAGE, _PROMPT = 192, 24
_PROMPTS = 3


@dataclass(frozen=True)
class Passage:
    """The beginning of a text as two models predict it, and prompts from what follows.

    Attributes:
        tokens: The beginning.
        prompts: Token ids of each prompt, [prompts, length], BOS included.
        bos: The BOS token in front of each; None for none.
        data_sha256: Digest of all token ids that were read.
    """

    tokens: tuple[PassageToken, ...]
    prompts: Tensor
    bos: int | None
    data_sha256: str


def compare_passage(
    model: str | Path, reference: str | Path, options: EvalOptions
) -> Passage:
    """Run two models over the beginning of a text.

    Args:
        model: The model to judge.
        reference: The model to compare it with.
        options: Text, device and memory. The beginning has 192 tokens, or `seq_len` if
            that is less; the three parts of that length after it begin with prompts.

    Raises:
        CalibrationError: The text is too short, or the tokenizers differ.
        HalveError: As in `halve.compare`.

    Cost:
        One pass of each model's weights.
    """
    options = _short(model, options)
    pair, segments = open_pair(model, reference, options)
    first = segments.part(slice(1))
    scores = [
        first.predictions(_logits(run_blocks(opened, first.ids, options, name)))[0]
        for opened, name in zip(pair, (MODEL, REFERENCE), strict=True)
    ]
    trusted = options.trust_remote_code
    decode = TokenTexts(load_tokenizer(pair[0].checkpoint.folder, trusted))
    return Passage(
        tokens=tuple(_tokens(first, scores, decode)),
        prompts=segments.ids[1:, :_PROMPT],
        bos=segments.bos,
        data_sha256=hashlib.sha256(segments.ids.numpy().tobytes()).hexdigest(),
    )


def _short(model: str | Path, options: EvalOptions) -> EvalOptions:
    """Return options for as many and as long segments as are needed."""
    config = load_config(resolve_model(model), options.trust_remote_code)
    longest = longest_sequence(config) or _PASSAGE
    length = min(options.seq_len or longest, longest, _PASSAGE)
    return replace(options, seq_len=length, segments=1 + _PROMPTS)


def _logits(stream: Stream) -> Tensor:
    """Return the logits of the only segment of a stream, [1, length, vocabulary]."""
    [(_, logits)] = all_logits(stream)
    return logits.cpu()


def _tokens(
    segment: Segments, scores: Sequence[Tensor], decode: TokenTexts
) -> Iterator[PassageToken]:
    """Yield the tokens of a segment with the predictions of both models.

    Args:
        segment: The segment.
        scores: Logits of the model and the reference, [length - 1, vocabulary].
        decode: From token ids to text.
    """
    start = int(segment.bos is not None)
    # With BOS the last token is not among those that are read, but among the targets.
    ids = [int(segment.ids[0, start]), *segment.targets[0].tolist()]
    log_q, log_p = (each.float().log_softmax(-1) for each in scores)
    divergences = (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    firsts = zip(log_q.argmax(-1).tolist(), log_p.argmax(-1).tolist(), strict=True)
    yield PassageToken(ids[0], decode.last(ids[:1]))
    for place, (divergence, (model, reference)) in enumerate(
        zip(divergences, firsts, strict=True), start=1
    ):
        before = ids[:place]
        yield PassageToken(
            id=ids[place],
            text=decode.last([*before, ids[place]]),
            kl=divergence,
            model_first=decode.last([*before, model]),
            reference_first=decode.last([*before, reference]),
            same_first=model == reference,
        )
