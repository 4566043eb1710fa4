"""`halve serve`."""

from typing import Annotated

import typer

from halve.cli import options

EXAMPLES = """
**Examples**

`halve serve ./opt-125m-packed`

`halve serve ./llama-24-packed --port 8080 --host 0.0.0.0`
"""


def command(
    model: options.Model,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "localhost",
    port: Annotated[
        int, typer.Option(help="Port to listen at.", min=1, max=65535)
    ] = 8000,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Serve a model, dense or packed, to clients of OpenAI's interface.

    This is transformers' own server, `transformers serve`, with Halve's packed models
    known to it. It needs `pip install 'halve[serve]'`.
    """
    from halve._compat.transformers import can_serve, serve
    from halve.errors import HalveError

    if not can_serve():
        raise HalveError(
            "The libraries of the server are not installed.",
            "Run pip install 'halve[serve]'.",
        )
    from contextlib import suppress
    from pathlib import Path

    from huggingface_hub.constants import HF_HUB_CACHE

    from halve.checkpoint import resolve_model
    from halve.runtime.generation import check_whole

    folder = resolve_model(model)
    # Refuses with a sentence what the server would trip over at the first request.
    opened = check_whole(folder, device, trust_remote_code)
    # The server lists what is in the hub's cache, and fails where there is none.
    with suppress(OSError):
        Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    serve(str(folder), host, port, str(opened.device), trust_remote_code)
