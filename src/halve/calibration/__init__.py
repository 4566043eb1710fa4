"""Calibration and evaluation text, its tokens, and storage for hidden states."""

from halve.calibration.chat_template import ChatTemplate
from halve.calibration.corpora import Corpus, corpus_nbytes, load_corpus
from halve.calibration.spill import (
    allocate_hidden,
    default_activation_memory,
    spill_weight,
)
from halve.calibration.token_texts import TokenTexts
from halve.calibration.tokens import (
    TextEncoder,
    automatic_bos,
    load_encoder,
    load_tokenizer,
)
from halve.calibration.windows import (
    Encode,
    Segments,
    check_vocabulary,
    cut_segments,
    draw_windows,
)

__all__ = [
    "ChatTemplate",
    "Corpus",
    "Encode",
    "Segments",
    "TextEncoder",
    "TokenTexts",
    "allocate_hidden",
    "automatic_bos",
    "check_vocabulary",
    "corpus_nbytes",
    "cut_segments",
    "default_activation_memory",
    "draw_windows",
    "load_corpus",
    "load_encoder",
    "load_tokenizer",
    "spill_weight",
]
