"""Turn text into windows of tokens: drawn for calibration, cut for evaluation."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from halve.calibration.corpora import Corpus
from halve.errors import CalibrationError

# From a text to its token ids.
Encode = Callable[[str], list[int]]

# Documents shorter than a window that may be drawn per window, before the documents are
# joined instead.
_MAX_SHORT_DRAWS = 50


def draw_windows(
    corpus: Corpus, encode: Encode, samples: int, length: int, seed: int
) -> Tensor:
    """Draw calibration windows as the SparseGPT paper does.

    From C4 and other collections, a random document longer than the window is drawn,
    then a random position in it. From a single text, or if documents are too short, a
    random position in the joined text is drawn.

    Args:
        corpus: The text to draw from.
        encode: Converts text to token ids, including the tokenizer's special tokens.
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
            return torch.tensor(drawn)
    tokens = encode(corpus.text)
    if len(tokens) < samples * length:
        raise CalibrationError(
            f"{corpus.name} has {len(tokens)} tokens, too few for {samples} samples of "
            f"{length}.",
            "Use more text, or fewer (--samples) or shorter (--seq-len) samples.",
        )
    return torch.tensor([_window(tokens, length, rng) for _ in range(samples)])


def _draw_documents(
    corpus: Corpus, encode: Encode, samples: int, length: int, rng: random.Random
) -> list[list[int]] | None:
    """Draw windows inside documents; None if too many documents are too short."""
    drawn: list[list[int]] = []
    short = 0
    while len(drawn) < samples:
        tokens = encode(rng.choice(corpus.documents))
        if len(tokens) > length:
            drawn.append(_window(tokens, length, rng))
            continue
        short += 1
        if short > _MAX_SHORT_DRAWS * (len(drawn) + 1):
            return None
    return drawn


def _window(tokens: list[int], length: int, rng: random.Random) -> list[int]:
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
) -> Tensor:
    """Cut the joined text into consecutive segments; drop an incomplete last one.

    Args:
        corpus: The text to evaluate on.
        encode: Converts text to token ids.
        length: The number of tokens in each segment.
        limit: The maximum number of segments; None for all.

    Returns:
        Token ids, [segments, length], int64.

    Raises:
        CalibrationError: There is no complete segment.
    """
    tokens = torch.tensor(encode(corpus.text))
    count = len(tokens) // length
    counts = [count, limit, corpus.token_limit]
    if count == 0:
        raise CalibrationError(
            f"{corpus.name} has {len(tokens)} tokens, too few for one segment of "
            f"{length}.",
            "Use more text, or shorter segments (--seq-len).",
        )
    count = min(c for c in counts if c is not None)
    return tokens[: count * length].view(count, length)
