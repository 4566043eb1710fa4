"""What two models predict of the same text, token by token, for reading."""

from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True)
class PassageToken:
    """One token of a text, and what two models predicted in its place.

    Attributes:
        id: The token.
        text: Its part of the text; empty for the first tokens of a character that
            takes several.
        kl: KL(reference || model) of the predictions of this token, in nats; None where
            it was not predicted, as for the first.
        model_first: The token that the model ranks first, as text.
        reference_first: The same of the reference.
        same_first: Whether these are the same token.
    """

    id: int
    text: str
    kl: float | None = None
    model_first: str = ""
    reference_first: str = ""
    same_first: bool = True


@dataclass(frozen=True)
class GeneratedToken:
    """One token that a model generated.

    Attributes:
        id: The token.
        text: Its part of the text, as in `PassageToken`.
    """

    id: int
    text: str


@dataclass(frozen=True)
class ContinuationRecord:
    """A prompt as two models continue it, taking the most likely token each time.

    Attributes:
        prompt: The prompt.
        model: New tokens of the model.
        reference: New tokens of the reference.
    """

    prompt: str
    model: tuple[GeneratedToken, ...]
    reference: tuple[GeneratedToken, ...]

    @property
    def same(self) -> int:
        """Number of new tokens before the first that differs."""
        pairs = zip(self.model, self.reference, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0].id == pair[1].id, pairs))


@dataclass(frozen=True)
class SamplesRecord:
    """A passage of held-out text, and continuations of others.

    Attributes:
        data: Name of the text.
        passage: Tokens of its beginning, without BOS.
        continuations: What follows on later parts of the text.
        bos: The BOS token that was read before each; None for none.
        data_sha256: Digest of the token ids of passage and prompts, as in
            `PerplexityRecord`.
    """

    data: str
    passage: tuple[PassageToken, ...]
    continuations: tuple[ContinuationRecord, ...]
    bos: int | None = None
    data_sha256: str = ""
