"""`halve generate`."""

import os
from typing import Annotated

import typer

from halve.cli.options import Model, with_options
from halve.option import Option
from halve.options import Activations, Device, TrustRemoteCode

EXAMPLES = """
**Examples**

`halve generate ./opt-125m-half "The road to"`

`halve generate ./llama-24 "def main():" --max-new-tokens 200`
"""


@with_options()
def command(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[
        int,
        Option("Maximum number of tokens to generate.", unit="tokens", minimum=1),
    ] = 64,
    device: Device = "auto",
    activations: Activations = "int16",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate text from a prompt with a model, dense or pruned."""
    from transformers.utils.logging import disable_progress_bar

    from halve.runtime.generation import generate

    disable_progress_bar()
    # Bytes that the locale's encoding lacks arrive as surrogates: the text is UTF-8.
    text = os.fsencode(prompt).decode("utf-8", "replace")
    print(
        generate(
            model,
            text,
            max_new_tokens=max_new_tokens,
            device=device,
            trust_remote_code=trust_remote_code,
            activations=activations,
        )
    )
