"""What `halve eval` measures."""

from dataclasses import dataclass, field


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
        losses: Mean token loss of each segment, in nats; two models on the same text
            are compared by the differences of these.
        data_sha256: Digest of the token ids, [segments, seq_len] in int64.
    """

    perplexity: float
    standard_error: float | None
    tokens: int
    seq_len: int
    segments: int
    data: str
    seconds: float
    bos: int | None = None
    losses: tuple[float, ...] = field(default=(), repr=False)
    data_sha256: str = ""


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
        kl_max: Largest divergence of a token.
        kl_error: Standard error of `kl_mean`, from the spread of the segments' means;
            None for one segment.
        agreement_error: The same of `agreement`.
        kl_quantiles: Per cent -> the smallest divergence that so many tokens do not
            exceed.
        kl_histogram: Number of tokens whose divergence is below 1e-8, and in each of 48
            bins of equal width in log10 from there to 100.
    """

    model: PerplexityRecord
    reference: PerplexityRecord
    kl_mean: float
    kl_median: float
    kl_99: float
    agreement: float
    kl_max: float
    kl_error: float | None
    agreement_error: float | None
    kl_quantiles: dict[str, float] = field(repr=False)
    kl_histogram: tuple[int, ...] = field(repr=False)
