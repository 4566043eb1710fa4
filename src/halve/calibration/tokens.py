"""The model's own tokenizer, as a function."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from halve.calibration.windows import Encode
from halve.errors import SourceError


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:  # noqa: ANN401
    """Return the tokenizer of a model's folder, one of transformers' classes.

    Raises:
        SourceError: The folder has no tokenizer that transformers can load.
    """
    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    # tokenizers raises bare Exceptions on damaged files; its panics are not even those.
    except BaseException as error:
        raise SourceError(
            f"The tokenizer in {folder} cannot be loaded "
            f"({' '.join(str(error).split())[:160].rstrip('. ')}).",
            "Put the model's tokenizer files into the folder.",
        ) from error


def load_encoder(folder: Path, trust_remote_code: bool = False) -> Encode:
    """Return a function from text to token numbers, special tokens as the model's own.

    Raises:
        SourceError: The folder has no tokenizer that transformers can load.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, verbose=False)["input_ids"])

    return encode
