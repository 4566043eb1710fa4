"""`halve generate`."""

import os
from typing import Annotated

import typer

from halve.cli.options import Model, with_options
from halve.options import GenerateOptions

EXAMPLES = """
**Examples**

`halve generate ./opt-125m-half "The road to"`

`halve generate ./llama-24 "def main():" --max-new-tokens 200`

`halve generate ./opt-125m-half "The road to" --temperature 0.8 --top-p 0.95 --seed 1`
"""


@with_options(panels=True)
def command(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    options: GenerateOptions,
) -> None:
    """Generate text from a prompt with a model, dense or pruned.

    On a terminal the text appears as it is generated.
    """
    import sys

    from transformers.utils.logging import disable_progress_bar

    from halve.api import generate

    disable_progress_bar()
    # Bytes that the locale's encoding lacks arrive as surrogates: the text is UTF-8.
    prompt = os.fsencode(prompt).decode("utf-8", "replace")
    if sys.stdout.isatty():
        generate(model, prompt, options=options, on_text=print_piece)
        print()
    else:
        print(generate(model, prompt, options=options))


def print_piece(text: str) -> None:
    """Print a piece of text without a line break, at once."""
    print(text, end="", flush=True)
