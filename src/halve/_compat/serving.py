"""Undocumented parts of transformers' server.

Tested with transformers 5.10 to 5.23. Each function imports what it needs, so that one
part that has moved breaks nothing else.
"""

# ruff: noqa: PLC0415

from collections.abc import Callable
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES = "/v1/responses"


def can_serve() -> bool:
    """Whether the libraries that `transformers serve` needs are installed.

    Undocumented: `utils.import_utils.is_serve_available`. When it breaks: try to import
    fastapi, uvicorn, pydantic and openai.
    """
    from transformers.utils.import_utils import is_serve_available

    return is_serve_available()


def serve(extend: Callable[[Any], None], folder: str, **options: Any) -> None:  # noqa: ANN401
    """Run transformers' server on one model until it is interrupted.

    Undocumented: `cli.serve.Serve`, whose constructor serves and takes the options of
    the command line `transformers serve`, which is documented; and that it looks up
    `cli.serving.server.build_server` when it is called. When it breaks: run that
    command in a process that has imported halve.

    Args:
        extend: Called with the FastAPI application before it is served.
        folder: Folder of the model.
        **options: Those of `transformers serve`.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server

    original = server.build_server

    def build(*arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401
        app = original(*arguments, **keywords)
        extend(app)
        return app

    server.build_server = build
    try:
        Serve(folder, **options)
    finally:
        server.build_server = original


def ignored_fields() -> dict[str, frozenset[str]]:
    """Return path -> fields of a request that the server accepts and ignores.

    Undocumented: `_unused_fields` of the handlers. When it breaks: list the fields by
    hand; the handlers warn of each.
    """
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler

    handlers = {
        CHAT: ChatCompletionHandler,
        COMPLETIONS: CompletionHandler,
        RESPONSES: ResponseHandler,
    }
    return {path: frozenset(h._unused_fields) for path, h in handlers.items()}


def chat_messages(path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a request as the server hands them to a chat template.

    Undocumented: `ResponseHandler._normalize_input`, and
    `BaseHandler.get_processor_inputs_from_messages`. When it breaks: return
    `body["messages"]`.

    Raises:
        Exception: The request is not what the OpenAI API describes; of any class.
    """
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import Modality

    is_response = path == RESPONSES
    messages = (
        ResponseHandler._normalize_input(body) if is_response else body["messages"]
    )
    return ResponseHandler.get_processor_inputs_from_messages(messages, Modality.LLM)
