"""Lets every request to transformers' server pass the rules first."""

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from halve.integrations.serving.rules import PATHS, RefusedRequest, RequestRules

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_MODELS = "/v1/models"


def extend_server(app: Any, rules: RequestRules) -> None:  # noqa: ANN401
    """Check requests to a FastAPI application, and let it list the model it serves.

    transformers lists the contents of the Hub's cache, in which a folder is not.
    """
    app.add_middleware(CheckRequests, rules=rules)
    routes = app.router.routes
    routes[:] = [route for route in routes if getattr(route, "path", "") != _MODELS]
    model = {
        "id": rules.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "halve",
    }
    app.get(_MODELS)(lambda: {"object": "list", "data": [model]})


@dataclass(frozen=True)
class CheckRequests:
    """An ASGI middleware that answers refused requests itself.

    Attributes:
        app: The application behind it.
        rules: What is refused, and what is changed.
    """

    app: Any
    rules: RequestRules

    async def __call__(self, scope: Any, receive: _Receive, send: _Send) -> None:  # noqa: ANN401
        """Handle one request, as the ASGI specification describes."""
        checks = scope["type"] == "http" and scope["path"] in PATHS
        if not checks or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        data = await _body(receive)
        try:
            data = self._checked(scope["path"], data)
        except RefusedRequest as refused:
            await _refuse(refused, send)
            return
        await self.app(scope, _replay(data, receive), send)

    def _checked(self, path: str, data: bytes) -> bytes:
        try:
            body = json.loads(data)
        except ValueError:
            return data  # the server refuses it with the place of the error
        if not isinstance(body, dict):
            return data
        return json.dumps(self.rules.checked(path, body)).encode()


async def _body(receive: _Receive) -> bytes:
    """Return the whole body of a request."""
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(data: bytes, receive: _Receive) -> _Receive:
    """Return a `receive` that gives this body first, then what is still to come."""
    waiting = [{"type": "http.request", "body": data, "more_body": False}]

    async def replay() -> _Message:
        return waiting.pop() if waiting else await receive()

    return replay


async def _refuse(refused: RefusedRequest, send: _Send) -> None:
    """Answer with status 400 and an error as the OpenAI API describes it."""
    error = {
        "message": refused.message,
        "type": "invalid_request_error",
        "param": refused.field,
        "code": None,
    }
    data = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
    ]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": data})
