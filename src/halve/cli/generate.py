"""`halve generate`."""

from typing import Annotated

import typer

from halve.cli import options

EXAMPLES = """
**Examples**

`halve generate ./opt-125m-half "The road to"`

`halve generate ./llama-24 "def main():" --max-new-tokens 200`
"""


def command(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[
        int, typer.Option(help="Stops after so many.", min=1)
    ] = 64,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Let a model, dense or pruned, go on from a prompt."""
    from transformers.utils.logging import disable_progress_bar

    from halve.runtime.generation import generate

    disable_progress_bar()
    print(
        generate(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    )
