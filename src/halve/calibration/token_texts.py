"""The text of single tokens."""

from collections.abc import Sequence
from typing import Any

# Tokens before one that may change how it is decoded, such as the bytes of a character.
_CONTEXT = 8
# Stands for bytes that are no whole character.
_INCOMPLETE = "\ufffd"


class TokenTexts:
    """Decodes tokens one by one, so that their texts together are that of all."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401
        self.tokenizer = tokenizer

    def last(self, ids: Sequence[int]) -> str:
        """Return what the last token adds to the text of those before it.

        A character that takes several tokens belongs to the last of them.
        """
        near = list(ids[-_CONTEXT:])
        before, text = self._text(near[:-1]), self._text(near)
        return text[len(before) :]

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text.rstrip(_INCOMPLETE)
