"""Answers that notice when their client is gone, streamed and not."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from market.types import FinishReason
from serve_apps.observed import seen_of
from serve_apps.shapes import DONE

Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody is there to be answered."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result; the work is cancelled when the client hangs up.

    Raises ClientGone. The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    except asyncio.CancelledError:  # this gateway ends before the answer does
        seen_of(request.scope).break_off()
        raise
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. The generator is closed at once when the client hangs up.

    Starlette's own streaming leaves a generator that waits in ``send`` to the garbage collector.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        super().__init__(None, headers={"cache-control": "no-cache", **headers})
        if "content-length" in self.headers:
            del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end or until the client is gone."""
        sending = asyncio.create_task(self._send(send))
        watching = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                seen_of(scope).error_code = FinishReason.CLIENT_DISCONNECT
        except asyncio.CancelledError:
            seen_of(scope).break_off()
            raise
        finally:
            sending.cancel()
            watching.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            start: dict[str, Any] = {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
            await send(start)
            more = True
            async for event in events:
                if event:
                    more = not event.endswith(DONE)  # nothing follows that: one write less
                    await send({"type": "http.response.body", "body": event, "more_body": more})
                if not more:
                    return
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
