"""Load a model's tokenizer, and use it as a function from text to token ids."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from halve._compat.transformers import is_rust_panic
from halve.calibration.pieces import Cutter, cutter_for
from halve.errors import HalveError, SourceError


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:  # noqa: ANN401
    """Load the tokenizer of a model folder as one of transformers' classes.

    Raises:
        SourceError: The folder has no tokenizer that transformers can load.
    """
    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except HalveError:
        raise
    except BaseException as error:
        # tokenizers raises plain Exceptions for damaged files, and its Rust panics are
        # BaseExceptions. Signals and exits are BaseExceptions too, and must pass.
        if not (isinstance(error, Exception) or is_rust_panic(error)):
            raise
        raise SourceError(
            f"The tokenizer in {folder} cannot be loaded "
            f"({' '.join(str(error).split())[:160].rstrip('. ')}).",
            "Put the model's tokenizer files into the folder.",
        ) from error


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer as a function from text to token ids.

    Attributes:
        tokenizer: One of transformers' tokenizers.
        bos: The BOS token, if windows begin with it. The tokenizer then adds no special
            tokens; otherwise it adds those that it is configured to add.
        cutter: Cuts the text into pieces; None if its tokens could change.
    """

    tokenizer: Any
    bos: int | None = None
    cutter: Cutter | None = None

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return list(chain.from_iterable(self.stream([text])))

    def stream(self, parts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the token ids of a text, some at a time.

        Args:
            parts: The text, in parts that are joined.

        Cost:
            Memory for a piece of the text, or some 165 bytes for each of its own if it
            cannot be cut.
        """
        adds = self.bos is None
        if self.cutter is None:
            yield self._ids("".join(parts), adds)
            return
        first, last = self._surroundings() if adds else ([], [])
        yield first
        for piece in self.cutter.pieces(parts):
            yield self._ids(piece, adds=False)
        yield last

    def _ids(self, text: str, adds: bool) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=adds, verbose=False)
        return list(encoded["input_ids"])

    def _surroundings(self) -> tuple[list[int], list[int]]:
        """Return the special tokens in front of a text, and after it."""
        bare, full = (self._ids("a", adds) for adds in (False, True))
        starts = range(len(full) - len(bare) + 1)
        start = next(i for i in starts if full[i : i + len(bare)] == bare)
        return full[:start], full[start + len(bare) :]


def load_encoder(
    folder: Path, trust_remote_code: bool = False, adds_bos: bool = False
) -> TextEncoder:
    """Load a model's tokenizer as a function from text to token ids.

    Args:
        folder: Folder of the model.
        trust_remote_code: Allow Python code that comes with the model to run.
        adds_bos: Whether windows begin with the BOS token, if the tokenizer puts it in
            front of a text by itself.

    Raises:
        SourceError: The folder has no tokenizer that transformers can load.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code)
    bos = automatic_bos(tokenizer) if adds_bos else None
    return TextEncoder(tokenizer, bos, cutter_for(tokenizer))


def automatic_bos(tokenizer: Any) -> int | None:  # noqa: ANN401
    """Return the BOS token if a tokenizer puts it in front of a text by itself."""
    first = tokenizer("", verbose=False)["input_ids"][:1]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and list(first) == [bos] else None
