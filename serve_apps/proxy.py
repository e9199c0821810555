"""What Ray Serve's HTTP proxy runs around every answer."""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = b"x-request-id"


class OneRequestId:
    """Keeps the first ``x-request-id`` of an answer.

    Serve appends an id of its own; with two of them, clients see neither.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, cleaning the head of its answer."""

        async def send_once(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = first_only(message["headers"])
            await send(message)

        await self._app(scope, receive, send_once)


def first_only(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers without any request id after the first."""
    kept: list[tuple[bytes, bytes]] = []
    seen = False
    for name, value in headers:
        is_id = name.lower() == REQUEST_ID
        if not (is_id and seen):
            kept.append((name, value))
        seen = seen or is_id
    return kept


def middlewares() -> list[Middleware]:
    """Found by Serve through RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(OneRequestId)]
