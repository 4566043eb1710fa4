"""Load a model's tokenizer, and use it as a function from text to token ids."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from halve._compat.transformers import is_rust_panic
from halve.calibration.windows import Encode
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


def load_encoder(folder: Path, trust_remote_code: bool = False) -> Encode:
    """Load a model's tokenizer and return a function from text to token ids.

    Special tokens are added as the tokenizer is configured to add them.

    Raises:
        SourceError: The folder has no tokenizer that transformers can load.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, verbose=False)["input_ids"])

    return encode
