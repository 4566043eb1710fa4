"""The windows of recovery: those that are trained on, and held-out ones of other text.

Recovery chooses its state by the held-out windows, so they share no text with the
others: one document in sixteen is held out, or the last sixteenth of each where there
are few documents.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from halve.calibration import (
    ChatTemplate,
    Corpus,
    check_vocabulary,
    draw_windows,
    load_corpus,
    load_encoder,
)
from halve.options import RecoverOptions
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.generation import sample_windows

# One part in so many of a text is held out.
_PARTS = 16


@dataclass(frozen=True)
class RecoveryWindows:
    """The windows of a run.

    Attributes:
        training: Token ids, [samples, length], int64.
        held_out: Token ids, [held_out, length], int64.
        bos: The BOS token with which every window begins; None for none.
    """

    training: Tensor
    held_out: Tensor
    bos: int | None

    def identity(self) -> dict[str, Any]:
        """Return what two runs on the same windows have in common."""
        digest = hashlib.sha256()
        for windows in (self.training, self.held_out):
            digest.update(windows.numpy().tobytes())
        return {"calibration_sha256": digest.hexdigest(), "bos_id": self.bos}


def recovery_windows(
    model: BlockwiseModel, dense: Path, options: RecoverOptions
) -> RecoveryWindows:
    """Return the windows of a run.

    Args:
        model: The model to recover, whose tokenizer is used.
        dense: Folder of the dense model, which samples the text of `self`.
        options: Text, numbers and length of the windows, and the seed.

    Raises:
        CalibrationError: There is too little text, or its tokens are not the model's.
        SourceError: There is no such text.
    """
    meta_model, trusted = model.meta_model, options.trust_remote_code
    folder = model.checkpoint.folder
    length = options.seq_len or meta_model.default_length
    meta_model.check_length(length)
    adds_bos = options.bos == "auto" and not meta_model.is_of_the_papers
    encode = load_encoder(folder, trusted, adds_bos)
    if options.calibration == "self":
        size = (options.samples + options.held_out, length, options.seed)
        drawn = sample_windows(dense, *size, trusted, bos=encode.bos)
        parts = drawn.split((options.samples, options.held_out))
    else:
        render = ChatTemplate(folder, trusted)
        corpus = load_corpus(options.calibration, "calibration", render)
        sizes = (options.samples, options.held_out)
        parts = tuple(
            draw_windows(part, encode, samples, length, options.seed)
            for part, samples in zip(split_text(corpus), sizes, strict=True)
        )
    for windows in parts:
        check_vocabulary(windows, meta_model.vocabulary)
    return RecoveryWindows(*parts, bos=encode.bos)


def split_text(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Return a text in two parts, of which the second is a sixteenth.

    Documents are whole in one part or the other, unless there are fewer than sixteen.
    """
    documents = corpus.documents
    if len(documents) < _PARTS:
        cuts = [len(text) - len(text) // _PARTS for text in documents]
        pairs = list(zip(documents, cuts, strict=True))
        first = [text[:cut] for text, cut in pairs]
        last = [text[cut:] for text, cut in pairs]
        return replace(corpus, documents=first), replace(corpus, documents=last)
    return (
        replace(corpus, documents=_Documents(documents, held_out=False)),
        replace(corpus, documents=_Documents(documents, held_out=True)),
    )


@dataclass(frozen=True)
class _Documents(Sequence[str]):
    """Some documents of a sequence, each read when it is asked for.

    Attributes:
        documents: All documents; there may be millions in a file.
        held_out: Whether these are every sixteenth, or all others.
    """

    documents: Sequence[str]
    held_out: bool

    def __len__(self) -> int:
        held_out = len(self.documents) // _PARTS
        return held_out if self.held_out else len(self.documents) - held_out

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        # Documents 15, 31, 47 ... are held out.
        if self.held_out:
            return self.documents[number * _PARTS + _PARTS - 1]
        return self.documents[number + number // (_PARTS - 1)]
