"""Cut a text into pieces whose tokens, one after another, are those of the whole.

Tokenizing a text as a whole takes some 165 bytes of memory for each of its own. A cut
does not change a token where

- the tokenizer splits the text before its model sees it, and goes on after the cut as
  if the text began there: a pre-tokenizer that is a pattern without look-behind, or one
  of the kinds below; or
- a byte-pair encoding sees the text unsplit (Llama 2, Gemma), and no token of its
  vocabulary has the two characters at the cut side by side. Every merge makes a token,
  so none crosses the cut, and merges on either side do not depend on each other.

Which of the two holds is read from the tokenizer, and tried at every cut with the text
around it. For any other tokenizer a text is one piece.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from halve._compat.transformers import tokenizer_parts

# Characters of a piece.
_SIZE = 2**16
# Characters on either side of a cut with which it is tried.
_CONTEXT = 256
# Cuts that are tried for a piece before it is made longer.
_TRIALS = 32
# Places to cut at: before a space between words, or after a line.
_PLACE = re.compile(r"(?<=\S)(?=\s\S)|(?<=\n)(?=\S)")
_PROBE = "A line of words, of which there are many.\nIt is 1 of 2 lines\nto cut. " * 20

# Normalizers and pre-tokenizers whose result at a position depends on nothing but its
# character, or the run of characters of one class that contains it.
_LOCAL = frozenset(
    {
        *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Lowercase", "Prepend"),
        *("StripAccents", "BertNormalizer", "ByteLevel", "Metaspace", "Whitespace"),
        *("WhitespaceSplit", "BertPreTokenizer", "Digits", "Punctuation"),
        "CharDelimiterSplit",
    }
)
# Patterns of Replace that are local although they match runs of characters.
_LOCAL_PATTERNS = frozenset({" {2,}"})
# A text that a cut may divide.
_ACROSS = re.compile(r"\S\s|\s\S")
# What makes a match depend on the text before it, or on its whole.
_LOOKS_BACK = re.compile(r"\(\?<[=!]|\\[bBAGZzKX]|[\^$.]")
_CHARACTER_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]")
_ESCAPED = re.compile(r"\\[^bBAGZzKX]")


@dataclass(frozen=True)
class Cutter:
    """Finds the places where a text may be cut for a tokenizer.

    Attributes:
        backend: A tokenizer of the tokenizers library.
    """

    backend: Any

    def pieces(self, parts: Iterable[str]) -> Iterator[str]:
        """Yield the pieces of a text.

        Args:
            parts: The text, in parts of any size that are joined.

        Cost:
            Memory for a piece and a part, where the text has spaces or lines.
        """
        rest, size = "", _SIZE
        for part in parts:
            rest += part
            while len(rest) >= size + _CONTEXT:
                cut = self.last_cut(rest, size)
                if cut is None:
                    size += _SIZE
                    continue
                end, begin = cut
                yield rest[:end]
                rest, size = rest[begin:], _SIZE
        yield rest

    def last_cut(self, text: str, end: int) -> tuple[int, int] | None:
        """Find a place to cut a text at.

        Args:
            text: The text, which is longer than `end` by the characters that a cut is
                tried with.
            end: Where to search, backwards.

        Returns:
            The end of the piece and the beginning of the next one; None if there is no
            such place.
        """
        places = [m.start() for m in _PLACE.finditer(text, end - _SIZE // 2, end)]
        for place in places[: -_TRIALS - 1 : -1]:
            # A tokenizer may put a space in front of a text: then the text's own space
            # is left out, and it takes its place.
            for begin in (place, place + 1):
                if self._is_cut(text, place, begin):
                    return place, begin
        return None

    def _is_cut(self, text: str, end: int, begin: int) -> bool:
        """Return whether a text may end at one place and go on at another."""
        before = text[max(end - _CONTEXT, 0) : end]
        after = text[end : end + _CONTEXT]
        omitted = begin - end
        if after[:omitted].strip(" ") or self._has_tokens_at(before, after, omitted):
            return False
        left, right = self._split(before), self._split(after[omitted:])
        both = self._split(before + after)
        return bool(left and right) and self._are_apart(left, right, both)

    def _has_tokens_at(self, before: str, after: str, omitted: int) -> bool:
        """Return whether an added token may lie at, or reach across, a cut.

        They are found before the text is split, and what is between two of them is
        treated as a text of its own.
        """
        if any(token in before + after for token in self._wide_tokens):
            return True
        tokens = self._added_tokens
        return before.endswith(tokens) or any(
            after[begin:].startswith(tokens) for begin in {0, omitted}
        )

    def _are_apart(self, left: list[str], right: list[str], both: list[str]) -> bool:
        """Return whether two texts have no token in common when they are joined.

        Args:
            left: What the model sees of the first one.
            right: What it sees of the second one.
            both: What it sees of both, joined.
        """
        if both == left + right:
            return True
        joined = [*left[:-1], left[-1] + right[0], *right[1:]]
        pair = left[-1][-1:] + right[0][:1]
        return both == joined and self._merges_alone and pair not in self._pairs

    def _split(self, text: str) -> list[str]:
        """Return what the tokenizer's model sees of a text."""
        if self.backend.normalizer is not None:
            text = self.backend.normalizer.normalize_str(text)
        if self.backend.pre_tokenizer is None:
            return [text] if text else []
        words = self.backend.pre_tokenizer.pre_tokenize_str(text)
        return [word for word, _ in words]

    @cached_property
    def _merges_alone(self) -> bool:
        """Whether the model is a byte-pair encoding that knows no ends of words."""
        model = self.backend.model
        affixes = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
        is_bpe = type(model).__name__ == "BPE"
        return is_bpe and not any(getattr(model, affix) for affix in affixes)

    @cached_property
    def _pairs(self) -> frozenset[str]:
        """All pairs of characters that are side by side in a token."""
        words = self.backend.get_vocab(with_added_tokens=False)
        return frozenset(
            word[i : i + 2] for word in words for i in range(len(word) - 1)
        )

    @cached_property
    def _added_tokens(self) -> tuple[str, ...]:
        """The texts of added tokens."""
        added = self.backend.get_added_tokens_decoder().values()
        return tuple({token.content.replace("▁", " ") for token in added} - {""})

    @cached_property
    def _wide_tokens(self) -> tuple[str, ...]:
        """Those of added tokens that reach beyond themselves, or across a space."""
        added = self.backend.get_added_tokens_decoder().values()
        strips = {t.content.replace("▁", " ") for t in added if t.lstrip or t.rstrip}
        across = {text for text in self._added_tokens if _ACROSS.search(text)}
        return tuple(strips | across)


def cutter_for(tokenizer: Any) -> Cutter | None:  # noqa: ANN401
    """Return a cutter for one of transformers' tokenizers.

    Returns:
        None if it is not known that texts may be cut for it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation or backend.padding:
        return None
    if not all(_is_local(part) for part in tokenizer_parts(backend)):
        return None
    cutter = Cutter(backend)
    return cutter if cutter.last_cut(_PROBE, len(_PROBE) - _CONTEXT) else None


def _is_local(part: dict[str, Any]) -> bool:
    """Return whether a normalizer or pre-tokenizer looks at nearby characters only.

    Args:
        part: Its description, as in tokenizer.json.
    """
    kind = part["type"]
    if kind in _LOCAL:
        return True
    if kind == "Sequence":
        parts = part.get("normalizers") or part.get("pretokenizers") or []
        return all(_is_local(each) for each in parts)
    pattern = part.get("pattern", {})
    if kind == "Replace" and "Regex" in pattern:
        return pattern["Regex"] in _LOCAL_PATTERNS
    if kind == "Replace":
        replaced = pattern["String"]
        return len(replaced) == 1 or not _ACROSS.search(replaced)
    return kind == "Split" and not _looks_back(pattern)


def _looks_back(pattern: dict[str, str]) -> bool:
    """Return whether a match may depend on what is before it."""
    if "String" in pattern:
        return False
    bare = _ESCAPED.sub("", _CHARACTER_CLASS.sub("", pattern["Regex"]))
    return _LOOKS_BACK.search(bare) is not None
