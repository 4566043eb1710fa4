"""Continue a text with a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from halve.api.keywords import takes, with_keywords
from halve.completion import Completer
from halve.options import GenerateKeywords, GenerateOptions


@takes(GenerateOptions)
def generate(
    model: str | Path,
    prompt: str,
    *,
    options: GenerateOptions | None = None,
    on_text: Callable[[str], None] | None = None,
    **keywords: Unpack[GenerateKeywords],
) -> str:
    """Return a prompt with its continuation, the most likely one by default.

    Args:
        model: A folder, dense or packed, or a name on the Hub.
        prompt: Text to continue.
        options: How tokens are chosen; by default `GenerateOptions()`.
        on_text: Called with each piece of the result as soon as it is known.
        **keywords: Fields of `GenerateOptions`, which override those of the object.

    Raises:
        HalveError: An option is invalid, the prompt is empty or longer than the model's
            context allows; and whatever `load` raises.

    Cost:
        Memory for the whole model; a packed one stays packed.
    """
    merged = with_keywords(options or GenerateOptions(), keywords)
    return Completer.open(model, merged).complete(prompt, on_text)
