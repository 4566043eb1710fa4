"""Calibration and evaluation text, its tokens, and storage for hidden states."""

from halve.calibration.chat_template import ChatTemplate
from halve.calibration.corpora import Corpus, load_corpus
from halve.calibration.spill import allocate_hidden, default_activation_memory
from halve.calibration.tokens import load_encoder, load_tokenizer
from halve.calibration.windows import (
    Encode,
    check_vocabulary,
    cut_segments,
    draw_windows,
)

__all__ = [
    "ChatTemplate",
    "Corpus",
    "Encode",
    "allocate_hidden",
    "check_vocabulary",
    "cut_segments",
    "default_activation_memory",
    "draw_windows",
    "load_corpus",
    "load_encoder",
    "load_tokenizer",
]
