"""Turn text into windows of tokens: drawn for calibration, cut for evaluation."""

import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from halve.calibration.corpora import Corpus
from halve.errors import CalibrationError

# Documents shorter than a window that may be drawn per window, before the documents are
# joined instead.
_MAX_SHORT_DRAWS = 50


class Encode(Protocol):
    """A tokenizer; see `TextEncoder`."""

    @property
    def bos(self) -> int | None:
        """The token in front of every window; None for none."""
        ...

    def stream(self, parts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the token ids of a text that is given in parts."""
        ...


@dataclass(frozen=True)
class Segments:
    """Consecutive parts of a text, of which all tokens but the first are predicted.

    Attributes:
        ids: What a model reads, [segments, length], int64. A BOS token in front takes
            the place of the last token, which is predicted, but not read.
        targets: The tokens to predict, [segments, length - 1], int64: the same with and
            without BOS.
        bos: The BOS token in front of every segment; None for none.
    """

    ids: Tensor
    targets: Tensor
    bos: int | None = None

    def predictions(self, logits: Tensor) -> Tensor:
        """Return the logits that predict targets, [segments, length - 1, vocabulary].

        Args:
            logits: Logits at all positions, [segments, length, vocabulary].
        """
        first = int(self.bos is not None)
        return logits[:, first : first + self.targets.shape[1]]

    def part(self, segments: slice) -> "Segments":
        """Return some of the segments."""
        return Segments(self.ids[segments], self.targets[segments], self.bos)


def draw_windows(
    corpus: Corpus, encode: Encode, samples: int, length: int, seed: int
) -> Tensor:
    """Draw calibration windows as the SparseGPT paper does.

    From C4 and other collections, a random document longer than the window is drawn,
    then a random position in it. From a single text, or if documents are too short, a
    random position in the joined text is drawn.

    Args:
        corpus: The text to draw from.
        encode: Converts text to token ids. Its BOS token, if any, is the first token
            of every window.
        samples: The number of windows.
        length: The number of tokens in each.
        seed: Seeds the draws; the same seed draws the same windows.

    Returns:
        Token ids, [samples, length], int64.

    Raises:
        CalibrationError: The joined text has fewer than samples * length tokens.
    """
    rng = random.Random(seed)
    if corpus.by_document:
        drawn = _draw_documents(corpus, encode, samples, length, rng)
        if drawn is not None:
            return _after_bos(torch.stack(drawn).long(), encode.bos)
    tokens = _tokens(encode, corpus.parts())
    if len(tokens) < samples * length:
        raise CalibrationError(
            f"{corpus.name} has {len(tokens)} tokens, too few for {samples} samples of "
            f"{length}.",
            "Use more text, or fewer (--samples) or shorter (--seq-len) samples.",
        )
    drawn = torch.stack([_window(tokens, length, rng) for _ in range(samples)])
    return _after_bos(drawn.long(), encode.bos)


def _tokens(encode: Encode, parts: Iterable[str], enough: int | None = None) -> Tensor:
    """Return the token ids of a text, or the first of them, [tokens], int32.

    Args:
        encode: The tokenizer.
        parts: The text, in parts that are joined.
        enough: Stop when there are so many; None for all.
    """
    tokens = array("i")
    for ids in encode.stream(parts):
        tokens.extend(ids)
        if enough is not None and len(tokens) >= enough:
            break
    if not tokens:
        return torch.empty(0, dtype=torch.int32)
    return torch.frombuffer(tokens, dtype=torch.int32)


def _after_bos(windows: Tensor, bos: int | None) -> Tensor:
    """Return windows with a token in front, which takes the place of their last one.

    Args:
        windows: Token ids, [samples, length].
        bos: The token in front; None for none.
    """
    if bos is None:
        return windows
    first = windows.new_full((len(windows), 1), bos)
    return torch.cat((first, windows[:, :-1]), dim=1)


def _draw_documents(
    corpus: Corpus, encode: Encode, samples: int, length: int, rng: random.Random
) -> list[Tensor] | None:
    """Draw windows inside documents; None if too many documents are too short."""
    drawn: list[Tensor] = []
    short = 0
    # Recovery draws thousands of windows, often from few documents. Keeping the tokens
    # takes no more memory: windows are views of them until they are stacked.
    encoded: dict[int, Tensor] = {}
    while len(drawn) < samples:
        number = rng.choice(range(len(corpus.documents)))
        tokens = encoded.get(number)
        if tokens is None:
            tokens = _tokens(encode, corpus.parts_of(corpus.documents[number]))
        if len(tokens) > length:
            encoded[number] = tokens
            drawn.append(_window(tokens, length, rng))
            continue
        short += 1
        if short > _MAX_SHORT_DRAWS * (len(drawn) + 1):
            return None
    return drawn


def _window(tokens: Tensor, length: int, rng: random.Random) -> Tensor:
    start = rng.randint(0, len(tokens) - length)
    return tokens[start : start + length]


def check_vocabulary(windows: Tensor, vocabulary: int) -> None:
    """Raise CalibrationError if a token id is outside of the model's vocabulary."""
    highest = int(windows.max())
    if highest >= vocabulary:
        raise CalibrationError(
            f"The tokenizer returns the token id {highest}, but the model has only "
            f"{vocabulary} tokens.",
            "Put the tokenizer that belongs to the model into its folder.",
        )


def cut_segments(
    corpus: Corpus, encode: Encode, length: int, limit: int | None = None
) -> Segments:
    """Cut the joined text into consecutive segments; drop an incomplete last one.

    Args:
        corpus: The text to evaluate on.
        encode: Converts text to token ids. Its BOS token, if any, is read before every
            segment.
        length: The number of tokens in each segment, 2 or more.
        limit: The maximum number of segments; None for all.

    Raises:
        CalibrationError: There is no complete segment.
    """
    limits = [count for count in (limit, corpus.token_limit) if count is not None]
    enough = length * min(limits) if limits else None
    tokens = _tokens(encode, corpus.parts(), enough)
    count = min([len(tokens) // length, *limits])
    if count == 0:
        raise CalibrationError(
            f"{corpus.name} has {len(tokens)} tokens, too few for one segment of "
            f"{length}.",
            "Use more text, or shorter segments (--seq-len).",
        )
    ids = tokens[: count * length].view(count, length).long()
    return Segments(_after_bos(ids, encode.bos), ids[:, 1:], encode.bos)
