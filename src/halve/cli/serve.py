"""`halve serve`."""

from typing import Annotated

from halve.cli.options import Model, with_options
from halve.option import Option
from halve.options import Device, TrustRemoteCode, check_device

EXAMPLES = """
**Examples**

`halve serve ./opt-125m-packed`

`halve serve ./llama-24-packed --port 8080 --host 0.0.0.0`
"""


@with_options()
def command(
    model: Model,
    host: Annotated[str, Option("Address to listen on.")] = "localhost",
    port: Annotated[int, Option("Port to listen on.", minimum=1, maximum=65535)] = 8000,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a model, dense or packed, over the OpenAI API.

    This runs `transformers serve`, with support for packed models. Requests that it
    would answer otherwise than asked are refused. It needs
    `pip install 'halve[serve]'`.
    """
    check_device(device)
    from halve._compat.serving import can_serve, serve
    from halve.errors import HalveError

    if not can_serve():
        raise HalveError(
            "The server's dependencies are not installed.",
            "Run pip install 'halve[serve]'.",
        )
    from contextlib import suppress
    from pathlib import Path

    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.utils.logging import disable_progress_bar

    from halve.checkpoint import resolve_model
    from halve.integrations.serving import extend_server, rules_for
    from halve.runtime.generation import check_whole

    disable_progress_bar()
    folder = resolve_model(model)
    # Otherwise the server would fail only at the first request, and without a message.
    opened = check_whole(folder, device, trust_remote_code)
    rules = rules_for(model, opened, trust_remote_code)
    # Only now: this import fails before transformers has imported its quantizers.
    from halve.integrations.transformers.quantizer import HalveQuantizer

    HalveQuantizer.prepares_decoding = True
    # The server lists the contents of the Hub's cache, and fails if there is none.
    with suppress(OSError):
        Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    serve(
        lambda app: extend_server(app, rules),
        str(folder),
        host=host,
        port=port,
        device=str(opened.device),
        trust_remote_code=trust_remote_code,
    )
