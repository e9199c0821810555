"""The link: how answers travel from a replica to the gateways that asked.

Ray moves each chunk of a stream through its object store and two event loops, about a millisecond
of CPU; thousands of chunks a second pass here. So each replica publishes its address and a secret,
and gateways hold one TCP connection to it for all of their streams. Frames are a length and
msgpack.

What a gateway has not taken yet is not sent: at most ``WINDOW`` frames are under way, and what
comes meanwhile is merged. So chunks stay single tokens while there is time and grow under load,
and a slow gateway needs no memory here.
Answers that nobody reads before their end come in blocks.
"""

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from market.credit import WHOLE_BLOCK_TOKENS, Credit
from market.errors import EngineFailed, MarketError, Overloaded
from market.types import EngineChunk, EngineRequest
from serve_apps.frames import (
    Abort,
    Adopt,
    Extend,
    Failure,
    News,
    Open,
    Piece,
    State,
    Taken,
    decode_asked,
    decode_news,
    encode,
    error_of,
    failure_of,
    framed,
    merge,
    read_frame,
    tune,
    write_frame,
)

logger = logging.getLogger(__name__)

WINDOW = 2
SECRET_MAX_BYTES = 256
CONNECT_TIMEOUT_S = 5.0
# How long to look for a replica that is not there: a lost one is started again meanwhile.
REPLICA_TIMEOUT_S = 120.0
ADDRESS_RETRY_S = 0.2
UNREACHED = OSError, TimeoutError, asyncio.IncompleteReadError, msgspec.DecodeError
CLOSE_POLL_S = 0.5
TAKEN_POLL_S = 0.02
ASLEEP = State(False, 0)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica listens, and what it wants to hear first."""

    host: str
    port: int
    secret: str = field(repr=False)

    def pack(self) -> bytes:
        """As it is published."""
        return msgspec.msgpack.encode(self)

    @staticmethod
    def unpack(entry: bytes) -> "Address":
        """What was packed."""
        return msgspec.msgpack.decode(entry, type=Address)


def adopt(entry: bytes, settings: dict[str, Any]) -> None:
    """Tell a process that waits for a model, at a packed address, to load one. Raises OSError."""
    address = Address.unpack(entry)
    where = address.host, address.port
    with socket.create_connection(where, CONNECT_TIMEOUT_S) as connection:
        connection.sendall(framed(address.secret.encode()) + framed(encode(Adopt(settings))))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(SECRET_MAX_BYTES):  # to its end: closed early, it may be lost
            pass


Generate = Callable[[EngineRequest, Credit], AsyncGenerator[EngineChunk, None]]


class LinkServer:
    """The replica's end: serves ``generate`` to gateways that know the secret.

    ``on_adopt`` is called with the settings of a model that the process is to load.
    """

    def __init__(
        self, generate: Generate, on_adopt: Callable[[dict[str, Any]], None] = lambda _: None
    ) -> None:
        self._generate = generate
        self._on_adopt = on_adopt
        self._server: asyncio.Server | None = None
        self._peers: set[_Peer] = set()
        self._state = ASLEEP
        self.secret = secrets.token_urlsafe(32)
        self.port = 0

    async def start(self, host: str) -> None:
        """Listen on any free port of ``host``."""
        self._server = await asyncio.start_server(self._serve, host, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def streams(self) -> int:
        """Answers under way."""
        return sum(len(peer.tasks) for peer in self._peers)

    def tell(self, state: State) -> None:
        """Let all gateways know, and those that come later."""
        self._state = state
        for peer in self._peers:
            peer.tell(state)

    async def stop(self, patience_s: float) -> None:
        """Take no new streams; end those under way, or not taken yet, after ``patience_s``."""
        self.tell(ASLEEP)
        if self._server is not None:
            self._server.close()
        tasks = []
        for peer in self._peers:
            peer.closing = True
            tasks += list(peer.tasks.values())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                if tasks:
                    await asyncio.wait(tasks)
                while any(peer.is_behind for peer in self._peers):
                    await asyncio.sleep(TAKEN_POLL_S)
        for peer in list(self._peers):
            await peer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tune(writer)
        peer = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                shown = await read_frame(reader, SECRET_MAX_BYTES)
            if not hmac.compare_digest(shown, self.secret.encode()):
                logger.warning("a connection without the secret was closed")
                return
            peer = _Peer(self._generate, writer)
            self._peers.add(peer)
            peer.tell(self._state)
            while True:
                asked = decode_asked(await read_frame(reader))
                if isinstance(asked, Adopt):
                    self._on_adopt(asked.settings)
                else:
                    peer.take(asked)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, msgspec.DecodeError):
            pass  # the gateway is gone, or was none
        finally:
            if peer is not None:
                self._peers.discard(peer)
                await peer.close()
            writer.close()


class _Peer:
    """One gateway: its streams, and what waits to be sent to it."""

    def __init__(self, generate: Generate, writer: asyncio.StreamWriter) -> None:
        self._generate = generate
        self._writer = writer
        self._credits: dict[int, Credit] = {}
        self._waiting: dict[int, list[EngineChunk]] = {}
        self._told: list[News] = []  # what is no chunk: ends of streams, the replica's state
        self._under_way = 0
        self._news = asyncio.Event()
        self._sender = asyncio.create_task(self._send())
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.closing = False

    def take(self, asked: Open | Extend | Abort | Taken) -> None:
        """Do what the gateway asks."""
        match asked:
            case Open(stream, request, tokens, final):
                if self.closing:
                    leaving = Overloaded("this replica is going down", retry_after_s=1)
                    self._told.append(Piece(stream, None, failure_of(leaving)))
                    self._news.set()
                    return
                credit = self._credits[stream] = Credit(tokens, final)
                task = asyncio.create_task(self._run(stream, request, credit))
                self.tasks[stream] = task
                task.add_done_callback(lambda _: self._forget(stream))
            case Extend(stream, tokens, final):
                if stream in self._credits:
                    self._credits[stream].extend(tokens, final)
            case Abort(stream):
                if stream in self.tasks:
                    self.tasks[stream].cancel()
            case Taken(frames):
                self._under_way -= frames
                self._news.set()

    @property
    def is_behind(self) -> bool:
        """Whether the gateway has not taken all there is: the ends of answers may be among it."""
        return bool(self._waiting or self._told or self._under_way)

    def tell(self, state: State) -> None:
        """What the replica says of itself."""
        self._told.append(state)
        self._news.set()

    async def close(self) -> None:
        """Nobody reads any more: abort what is under way."""
        running = [*self.tasks.values(), self._sender]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _run(self, stream: int, request: EngineRequest, credit: Credit) -> None:
        failure, begun = None, False
        held: list[EngineChunk] = []
        try:
            chunks = self._generate(request, credit)
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    held.append(chunk)
                    # What nobody reads before its end comes in blocks; the first token at once, for
                    # it shows that the prompt was prefilled, and what waits for credit.
                    tokens = sum(len(h.token_ids) for h in held)
                    if request.stream or not begun or chunk.wants or tokens >= WHOLE_BLOCK_TOKENS:
                        begun = begun or tokens > 0
                        self._pass_on(stream, held)
        except MarketError as error:
            failure = failure_of(error)
        except Exception as error:
            logger.exception("stream %s broke", request.request_id)
            failure = failure_of(
                EngineFailed(f"the engine failed: {type(error).__name__}: {error}")
            )
        self._pass_on(stream, held)
        self._told.append(Piece(stream, None, failure))

    def _pass_on(self, stream: int, held: list[EngineChunk]) -> None:
        if held:
            self._waiting.setdefault(stream, []).extend(held)
            held.clear()
        self._news.set()

    def _forget(self, stream: int) -> None:
        """The stream has ended, perhaps before it began: aborted in the frame that opened it."""
        self.tasks.pop(stream, None)
        self._credits.pop(stream, None)

    async def _send(self) -> None:
        """Frames, as fast as the gateway takes them: with each goes all there is."""
        with contextlib.suppress(OSError):
            while True:
                await self._news.wait()
                self._news.clear()
                if self._under_way >= WINDOW or not (self._waiting or self._told):
                    continue
                news: list[News] = [Piece(n, merge(new)) for n, new in self._waiting.items()]
                news += self._told
                self._waiting.clear()
                self._told.clear()
                self._under_way += 1
                write_frame(self._writer, encode(news))
                await self._writer.drain()


class Link:
    """The gateway's end: an Engine port over one connection, made again when it is lost."""

    def __init__(
        self,
        address: Callable[[], Awaitable[Address | None]],
        on_state: Callable[[], None] = lambda: None,
    ) -> None:
        """``address`` says where the replica listens, if it does; that says when it is awake."""
        self._address = address
        self._on_state = on_state
        self._state = ASLEEP
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._connecting: asyncio.Task[asyncio.StreamWriter] | None = None
        self._closed = False
        self._streams: dict[int, _Stream] = {}
        self._last = 0

    @property
    def connected(self) -> bool:
        """Whether the replica can be asked at once."""
        return self._writer is not None

    @property
    def awake(self) -> bool:
        """Whether its engine answers at once."""
        return self._state.awake

    def doubt(self) -> None:
        """It counts as awake only when it says so once more."""
        self._state = State(False, self._state.kv_tokens)

    @property
    def streams(self) -> int:
        """Answers under way through this link."""
        return len(self._streams)

    @property
    def borrowed(self) -> int:
        """Those of them that a lease's holder lets go on here while idle."""
        return sum(stream.borrowed for stream in self._streams.values())

    @property
    def kv_used(self) -> float:
        """The part of the replica's KV cache that our answers have; 0 if its size is unknown."""
        held = sum(stream.tokens for stream in self._streams.values())
        return held / self._state.kv_tokens if self._state.kv_tokens else 0.0

    async def generate(
        self, request: EngineRequest, credit: Credit
    ) -> AsyncGenerator[EngineChunk, None]:
        """Stream from the replica; closing the iterator aborts the answer there.

        Raises EngineFailed if the replica cannot be reached or dies.
        """
        writer = await self._connected()
        self._last += 1
        number = self._last
        stream = self._streams[number] = _Stream(request)
        credit.on_extend = lambda: self._extend(number, credit)
        try:
            self._send(writer, Open(number, request, credit.tokens, credit.final))
            while True:
                chunk = await stream.next()
                if chunk is None:
                    return
                yield chunk
        finally:
            credit.on_extend = None
            del self._streams[number]
            if not stream.ended:
                self._send(writer, Abort(number))

    async def close(self) -> None:
        """Close the connection as soon as no stream is under way: a replica drains."""
        while self._streams:
            await asyncio.sleep(CLOSE_POLL_S)
        self._closed = True
        for task in (self._connecting, self._reading):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _extend(self, number: int, credit: Credit) -> None:
        if self._writer is not None:
            self._send(self._writer, Extend(number, credit.tokens, credit.final))

    def _send(self, writer: asyncio.StreamWriter, asked: Open | Extend | Abort | Taken) -> None:
        with contextlib.suppress(OSError):  # the reader notices, too, and says so to all streams
            write_frame(writer, encode(asked))

    def connect(self) -> None:
        """Begin to connect, so that no request has to wait for it."""
        if self._writer is None and (self._connecting is None or self._connecting.done()):
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(_seen)

    async def _connected(self) -> asyncio.StreamWriter:
        if self._writer is not None:
            return self._writer
        self.connect()
        attempt = self._connecting  # one for all who wait
        assert attempt is not None
        try:
            return await asyncio.shield(attempt)
        except asyncio.CancelledError:
            asked = asyncio.current_task()
            if attempt.cancelled() and not (asked and asked.cancelling()):  # the link was closed
                raise EngineFailed("the replica is gone") from None
            raise

    async def _connect(self) -> asyncio.StreamWriter:
        """Look for it until it is there: what is known may be where it was before it died."""
        try:
            async with asyncio.timeout(REPLICA_TIMEOUT_S):
                while True:
                    with contextlib.suppress(*UNREACHED):
                        found = await self._address()
                        if found is not None:
                            return await self._connect_to(found)
                    await asyncio.sleep(ADDRESS_RETRY_S)
        except TimeoutError as error:
            raise EngineFailed("the replica cannot be reached") from error

    async def _connect_to(self, found: Address) -> asyncio.StreamWriter:
        """Connected is who has been told the replica's state."""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(found.host, found.port)
            try:
                tune(writer)
                write_frame(writer, found.secret.encode())
                news = decode_news(await read_frame(reader))
            except BaseException:
                writer.close()
                raise
        self._writer = writer
        self._reading = asyncio.create_task(self._read_forever(reader, writer, news))
        return writer

    async def _read_forever(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, news: list[News]
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                for piece in news:
                    if isinstance(piece, State):
                        self._state = piece
                        self._on_state()
                    elif (stream := self._streams.get(piece.stream)) is not None:
                        stream.put(piece)
                # The streams just woken run before this callback: their chunks are passed on.
                loop.call_soon(self._send, writer, Taken(1))
                news = decode_news(await read_frame(reader))
        except (OSError, asyncio.IncompleteReadError, msgspec.DecodeError) as error:
            logger.info("link lost: %r", error)
        finally:
            self._writer = None
            self._state = ASLEEP
            writer.close()
            lost = failure_of(EngineFailed("the replica is gone"))
            for stream in self._streams.values():
                stream.put(Piece(0, None, lost))
            if not self._closed:
                self.connect()


class _Stream:
    """What has come of one answer and was not passed on yet."""

    def __init__(self, request: EngineRequest) -> None:
        self.tokens = len(request.prompt_token_ids)  # and those of the answer so far
        self.borrowed = request.borrowed
        self._chunks: list[EngineChunk] = []
        self._failure: Failure | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.ended = False

    def put(self, piece: Piece) -> None:
        if piece.chunk is not None:
            self._chunks.append(piece.chunk)
            self.tokens += len(piece.chunk.token_ids)
        else:
            self.ended = True
            self._failure = piece.failure
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> EngineChunk | None:
        """All there is, as one chunk; None at the end."""
        while not self._chunks:
            if self._failure is not None:
                raise error_of(self._failure)
            if self.ended:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        chunk = merge(self._chunks)
        self._chunks.clear()
        return chunk


def _seen(attempt: "asyncio.Task[asyncio.StreamWriter]") -> None:
    """Perhaps nobody waits for it."""
    if not attempt.cancelled() and attempt.exception() is not None:
        logger.info("%s", attempt.exception())
