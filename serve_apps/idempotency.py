"""``Idempotency-Key``: a request is answered and billed once, however often it is sent.

The answer is made by a task of its own, which goes on when the client hangs up, so that the retry
finds it.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import uuid
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from market.answers import StoredAnswer
from market.errors import InvalidRequest, MarketError, Overloaded
from market.types import Principal
from serve_apps.shapes import DONE
from serve_apps.streams import EventStream

logger = logging.getLogger(__name__)

KEY_MAX = 255
Result = TypeVar("Result")

NOT_KEPT = frozenset({"content-length", "date", "server"})


class AnswerStore(Protocol):
    """Where answers are kept for all gateways."""

    async def begin(
        self, tenant_id: str, key: str, body_digest: str, owner: tuple[str, int], attempt: str
    ) -> StoredAnswer | None:
        """The answer that is there, or None."""
        ...

    async def finish(
        self, tenant_id: str, key: str, owner: tuple[str, int], answer: StoredAnswer
    ) -> None:
        """Keep an answer."""
        ...

    async def drop(self, tenant_id: str, key: str, owner: tuple[str, int]) -> None:
        """Free a key."""
        ...


class Idempotency:
    """Wraps the making of answers."""

    def __init__(self, store: AnswerStore, owner: Callable[[], tuple[str, int]]) -> None:
        self._store = store
        self._owner = owner
        self._tasks: set[asyncio.Task[Any]] = set()

    async def answer(
        self, request: Request, caller: Principal, make: Callable[[], Awaitable[Response]]
    ) -> Response:
        """What ``make`` answers, or what it answered before to the same key and body.

        Raises Conflict, DifferentBody, InvalidRequest.
        """
        key = request.headers.get("idempotency-key", "")
        if not 1 <= len(key) <= KEY_MAX:
            raise InvalidRequest(f"Idempotency-Key: 1 to {KEY_MAX} characters")
        digest = hashlib.sha256(request.url.path.encode() + b"\n" + await request.body())
        name, owner = (caller.subject_id, key), self._owner()
        stored = await self._store.begin(*name, digest.hexdigest(), owner, uuid.uuid4().hex)
        if stored is not None:
            return _replay(stored)
        making = self._spawn(self._make(name, owner, make))
        return await asyncio.shield(making)

    async def drain(self) -> None:
        """Wait until every answer that was begun is kept."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _make(
        self,
        name: tuple[str, str],
        owner: tuple[str, int],
        make: Callable[[], Awaitable[Response]],
    ) -> Response:
        try:
            response = await make()
        except BaseException:
            await self._drop(name, owner)
            raise
        if isinstance(response, EventStream):
            tee = _Tee(response.events)
            self._spawn(self._read(name, owner, response, tee))
            return EventStream(tee.follow(), dict(response.headers))
        if response.status_code != 200:
            await self._drop(name, owner)
        else:
            await self._keep(name, owner, response, bytes(response.body))
        return response

    async def _read(
        self, name: tuple[str, str], owner: tuple[str, int], response: Response, tee: "_Tee"
    ) -> None:
        """Read a stream to its end, whether or not its client still does."""
        if await tee.read():
            await self._keep(name, owner, response, b"".join(tee.parts))
        else:
            await self._drop(name, owner)

    async def _keep(
        self, name: tuple[str, str], owner: tuple[str, int], response: Response, body: bytes
    ) -> None:
        headers = {k: v for k, v in response.headers.items() if k not in NOT_KEPT}
        content = await asyncio.to_thread(zlib.compress, body)
        try:
            await self._store.finish(*name, owner, StoredAnswer(json.dumps(headers), content))
        except MarketError as error:
            # The key stays in use until its hour is over: rather no retry than a second bill.
            logger.error("an answer was not kept: %s", error)

    async def _drop(self, name: tuple[str, str], owner: tuple[str, int]) -> None:
        with contextlib.suppress(Overloaded):
            await self._store.drop(*name, owner)

    def _spawn(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Tee:
    """A stream that is read once and can be followed from its start."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events
        self._news = asyncio.Condition()
        self._ended = False
        self.parts: list[bytes] = []

    async def read(self) -> bool:
        """Read to the end; whether that was a good one."""
        try:
            async for part in self._events:
                self.parts.append(part)
                async with self._news:
                    self._news.notify_all()
        finally:
            self._ended = True
            async with self._news:
                self._news.notify_all()
        last = self.parts[-1] if self.parts else b""
        return last.endswith(DONE) or b"event: response." in last

    async def follow(self) -> AsyncGenerator[bytes, None]:
        """All parts, as they come."""
        given = 0
        while True:
            async with self._news:
                while given == len(self.parts) and not self._ended:
                    await self._news.wait()
            if given == len(self.parts):
                return
            fresh = b"".join(self.parts[given:])
            given = len(self.parts)
            yield fresh


def _replay(stored: StoredAnswer) -> Response:
    headers = json.loads(stored.headers) | {"idempotency-replayed": "true"}
    return Response(zlib.decompress(stored.content), headers=headers)
