"""From text to windows of tokens: drawn for calibration, cut for evaluation."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from halve.calibration.corpora import Corpus
from halve.errors import CalibrationError

# Text in, token numbers out: what a tokenizer does.
Encode = Callable[[str], list[int]]

# Draws of documents shorter than a window before short documents are joined instead.
_PATIENCE = 50


def draw_windows(
    corpus: Corpus, encode: Encode, samples: int, length: int, seed: int
) -> Tensor:
    """Draw calibration windows as the SparseGPT paper does.

    From C4 and other collections: a random document longer than the window, then a
    random place in it. From a single text, or where documents are too short: a random
    place in the joined text.

    Args:
        corpus: Where to draw from.
        encode: Turns text into token numbers, with whatever the tokenizer adds.
        samples: How many windows.
        length: Tokens in each.
        seed: The same seed draws the same windows.

    Returns:
        [samples, length], int64.

    Raises:
        CalibrationError: The joined text has fewer tokens than were asked for.
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
            "Give more text, or ask for fewer (--samples) or shorter (--seq-len) ones.",
        )
    return torch.tensor([_window(tokens, length, rng) for _ in range(samples)])


def _draw_documents(
    corpus: Corpus, encode: Encode, samples: int, length: int, rng: random.Random
) -> list[list[int]] | None:
    drawn: list[list[int]] = []
    short = 0
    while len(drawn) < samples:
        tokens = encode(rng.choice(corpus.documents))
        if len(tokens) > length:
            drawn.append(_window(tokens, length, rng))
            continue
        short += 1
        if short > _PATIENCE * (len(drawn) + 1):
            return None
    return drawn


def _window(tokens: list[int], length: int, rng: random.Random) -> list[int]:
    start = rng.randint(0, len(tokens) - length)
    return tokens[start : start + length]


def check_vocabulary(windows: Tensor, vocabulary: int) -> None:
    """Raise CalibrationError where a tokenizer gives tokens that a model lacks."""
    highest = int(windows.max())
    if highest >= vocabulary:
        raise CalibrationError(
            f"The tokenizer gives the token {highest}, but the model knows "
            f"{vocabulary} tokens only.",
            "Put the tokenizer that belongs to the model into its folder.",
        )


def cut_segments(
    corpus: Corpus, encode: Encode, length: int, limit: int | None = None
) -> Tensor:
    """Cut the joined text into segments that do not overlap; the rest is dropped.

    Args:
        corpus: What to judge on.
        encode: Turns text into token numbers.
        length: Tokens in each segment.
        limit: At most so many segments.

    Returns:
        [segments, length], int64.

    Raises:
        CalibrationError: There is not one whole segment.
    """
    tokens = torch.tensor(encode(corpus.text))
    count = len(tokens) // length
    counts = [count, limit, corpus.token_limit]
    if count == 0:
        raise CalibrationError(
            f"{corpus.name} has {len(tokens)} tokens, too few for one segment of "
            f"{length}.",
            "Give more text, or ask for shorter segments (--seq-len).",
        )
    count = min(c for c in counts if c is not None)
    return tokens[: count * length].view(count, length)
