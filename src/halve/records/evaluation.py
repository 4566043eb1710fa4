"""What `halve eval` measures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PerplexityRecord:
    """Perplexity of a model on a text.

    Attributes:
        perplexity: exp of the mean over segments of the segment's mean token loss.
        standard_error: Standard error of the perplexity, from the spread of the
            segments' losses; None for a single segment.
        tokens: Number of predicted tokens.
        seq_len: Tokens per segment, the first of which is not predicted.
        segments: Number of segments.
        data: Name of the text.
        seconds: Wall time.
        bos: The BOS token that was read before every segment; None for none.
    """

    perplexity: float
    standard_error: float | None
    tokens: int
    seq_len: int
    segments: int
    data: str
    seconds: float
    bos: int | None = None


@dataclass(frozen=True)
class ComparisonRecord:
    """A model compared with a reference, token by token, on the same text.

    Attributes:
        model: Perplexity of the model.
        reference: Perplexity of the reference.
        kl_mean: Mean over tokens of KL(reference || model), the Kullback-Leibler
            divergence of the predicted distributions, in nats.
        kl_median: Median over tokens of the same.
        kl_99: 99th percentile over tokens of the same.
        agreement: Fraction of tokens for which both models rank the same next token
            first.
    """

    model: PerplexityRecord
    reference: PerplexityRecord
    kl_mean: float
    kl_median: float
    kl_99: float
    agreement: float
