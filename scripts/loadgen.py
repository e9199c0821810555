"""A load generator that costs little CPU: raw asyncio with uvicorn's own HTTP parser.

On two cores the client is part of every measurement; httpx spends more on a chunk than the servers.
"""

import asyncio
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

CONTENT = re.compile(rb'"(?:content|text)":\s*"[^"]')
USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass
class Answer:
    """One answer as the client saw it. Times are seconds of a monotonic clock."""

    began_s: float
    status: int = 0
    first_s: float | None = None
    ended_s: float = 0.0
    tokens: int = 0
    complete: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self.answer = Answer(0.0)
        self._tail = b""
        self._kept: list[bytes] = []
        self.stream = True
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Open."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer."""
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Closed by the server."""
        self.lost = True
        self._end()

    def on_header(self, name: bytes, value: bytes) -> None:
        """From the parser."""
        self.answer.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        """From the parser."""
        self.answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """From the parser."""
        answer = self.answer
        if answer.status != 200 or not self.stream:
            self._kept.append(body)
            return
        if answer.first_s is None and CONTENT.search(body):
            answer.first_s = time.perf_counter()
        self._tail = (self._tail + body)[-2000:]

    def on_message_complete(self) -> None:
        """From the parser."""
        answer, tail = self.answer, self._tail
        if self._kept:
            answer.body = tail = b"".join(self._kept)
        found = USAGE.findall(tail)
        answer.tokens = int(found[-1]) if found else 0
        done = b"data: [DONE]" in tail if self.stream else bool(found)
        answer.complete = answer.status == 200 and done
        self._end()

    def _end(self) -> None:
        self.answer.ended_s = time.perf_counter()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    async def ask(self, request: bytes, stream: bool) -> Answer:
        """Send a request and wait for its whole answer."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._tail, self._kept, self.stream = b"", [], stream
        self.answer = Answer(time.perf_counter())
        self._transport.write(request)
        await self._done
        return self.answer

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()


def http_request(url: str, key: str, path: str, body: dict[str, Any]) -> bytes:
    """The bytes of a POST."""
    content = json.dumps(body).encode()
    host = urlsplit(url).netloc
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def connect(url: str) -> Connection:
    """A new connection to the server at ``url``."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, parts.hostname, parts.port)
    return connection


async def load(
    url: str,
    requests: Iterable[bytes],
    concurrency: int,
    stream: bool,
    on_answer: Callable[[Answer], None],
    timeout_s: float = 120,
    jitter_s: float = 0.0,
) -> float:
    """Keep ``concurrency`` of the requests under way until all are answered; returns seconds.

    Each waits up to ``jitter_s`` before it is sent, at random (the same for every server): clients
    must not fall into step with an engine's steps.
    """
    chance = random.Random(1)
    left = iter(requests)

    async def worker() -> None:
        connection = await connect(url)
        for request in left:
            if connection.lost:
                connection = await connect(url)
            await asyncio.sleep(chance.uniform(0, jitter_s))
            try:
                async with asyncio.timeout(timeout_s):
                    on_answer(await connection.ask(request, stream))
            except TimeoutError:
                on_answer(connection.answer)
                connection.close()
                connection = await connect(url)
        connection.close()

    began_s = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return time.perf_counter() - began_s


def percentile(values: list[float], percent: int) -> float:
    """Linear interpolation between order statistics; not a number without values."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
