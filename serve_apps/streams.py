"""Answers that notice when their client is gone, streamed and not."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from market.errors import MarketError, MarketFault
from market.types import FinishReason
from serve_apps.observed import Seen, seen_of
from serve_apps.shapes import DONE, event

logger = logging.getLogger(__name__)

# Shorter than the least patience of proxies and load balancers, which is 30 s or more.
COMMENT_S = 10.0
COMMENT = b": waiting for the model\n\n"


class ClientGone(Exception):
    """Nobody is there to be answered."""


async def unless_gone(
    request: Request, work: Coroutine[Any, Any, Response], is_patient: Callable[[], bool]
) -> Response:
    """The work's answer; the work is cancelled when the client hangs up.

    If it takes long and ``is_patient``, a stream begins before there is anything to say. Raises
    ClientGone. The request's body must have been read.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(request.receive))
    ours = True
    try:
        both = {working, watching}
        if not await _one_of(both, COMMENT_S):
            if is_patient():
                ours = False
                return EventStream(_kept_alive(working, seen_of(request.scope)), {})
            await _one_of(both)
        if working.done():
            return working.result()
        raise ClientGone
    except asyncio.CancelledError:  # this gateway ends before the answer does
        seen_of(request.scope).break_off()
        raise
    finally:
        own = (working, watching) if ours else (watching,)
        for task in own:
            task.cancel()
        await asyncio.gather(*own, return_exceptions=True)


async def _kept_alive(working: asyncio.Task[Response], seen: Seen) -> AsyncGenerator[bytes, None]:
    """A comment, then the answer's events; its error as an event."""
    try:
        yield COMMENT
        answer = await working
        assert isinstance(answer, EventStream)
        async with aclosing(answer.events) as events:
            async for piece in events:
                yield piece
    except MarketError as error:
        seen.error_code = error.code
        yield event(error.body())
    except Exception:
        logger.exception("a request broke while it was kept alive")
        fault = MarketFault("internal error; you are not billed")
        seen.error_code = fault.code
        yield event(fault.body())
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. The generator is closed at once when the client hangs up.

    While no event comes, comments do: neither clients nor proxies between may think it dead.
    Starlette's own streaming leaves a generator that waits in ``send`` to the garbage collector.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        super().__init__(None, headers={"cache-control": "no-cache", **headers})
        if "content-length" in self.headers:
            del self.headers["content-length"]
        self.events = events
        self._said_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end or until the client is gone."""
        sending = asyncio.create_task(self._send(send))
        watching = asyncio.create_task(_disconnected(receive))
        commenting = asyncio.create_task(self._comment(send))
        try:
            await _one_of({sending, watching})
            if sending.done():
                sending.result()
            else:
                seen_of(scope).error_code = FinishReason.CLIENT_DISCONNECT
        except asyncio.CancelledError:
            seen_of(scope).break_off()
            raise
        finally:
            tasks = sending, watching, commenting
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _comment(self, send: Send) -> None:
        self._said_s = time.monotonic()
        while True:
            quiet_s = time.monotonic() - self._said_s
            if quiet_s < COMMENT_S:
                await asyncio.sleep(COMMENT_S - quiet_s)
                continue
            self._said_s = time.monotonic()
            await send({"type": "http.response.body", "body": COMMENT, "more_body": True})

    async def _send(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            start: dict[str, Any] = {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
            await send(start)
            more = True
            async for piece in events:
                if piece:
                    more = not piece.endswith(DONE)  # nothing follows that: one write less
                    self._said_s = time.monotonic()
                    await send({"type": "http.response.body", "body": piece, "more_body": more})
                if not more:
                    return
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _one_of(tasks: set[asyncio.Task[Any]], timeout_s: float | None = None) -> bool:
    """Whether one of them ends in time."""
    done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
