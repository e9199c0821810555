"""What travels on a link between a gateway and a replica: frames of msgpack behind a length."""

import asyncio
import socket
import struct
from typing import Any

import msgspec

from market import errors
from market.errors import EngineFailed, MarketError
from market.types import EngineChunk, EngineRequest

FRAME_MAX_BYTES = 64 * 2**20
UNACKNOWLEDGED_MS = 10_000
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 5, 2, 3
_LENGTH = struct.Struct("<I")


class Open(msgspec.Struct, array_like=True, tag=0):
    """Begin a stream."""

    stream: int
    request: EngineRequest
    credit: int
    final: bool


class Extend(msgspec.Struct, array_like=True, tag=1):
    """More tokens are paid for; with ``final`` no more will be."""

    stream: int
    credit: int
    final: bool


class Abort(msgspec.Struct, array_like=True, tag=2):
    """Nobody reads the stream any more."""

    stream: int


class Taken(msgspec.Struct, array_like=True, tag=3):
    """The gateway has passed so many frames on."""

    frames: int


class Adopt(msgspec.Struct, array_like=True, tag=4):
    """Load this: the settings of a replica, for a process that waits for them."""

    settings: dict[str, Any]


class Failure(msgspec.Struct, array_like=True):
    """A MarketError on its way; ``kind`` is the name of its class."""

    kind: str
    message: str
    code: str
    param: str | None
    retry_after_s: float | None


class Piece(msgspec.Struct, array_like=True, tag=0):
    """News of one stream: a chunk, its failure, or (neither) its end."""

    stream: int
    chunk: EngineChunk | None = None
    failure: Failure | None = None


class State(msgspec.Struct, array_like=True, tag=1):
    """Whether the replica answers at once, and how many tokens its KV cache holds (0: unknown)."""

    awake: bool
    kv_tokens: int


Asked = Open | Extend | Abort | Taken | Adopt
News = Piece | State
encode = msgspec.msgpack.Encoder().encode
decode_asked = msgspec.msgpack.Decoder(Asked).decode
decode_news = msgspec.msgpack.Decoder(list[News]).decode


def merge(chunks: list[EngineChunk]) -> EngineChunk:
    """Consecutive chunks as one: what accumulates joined, counts and reason of the last."""
    if len(chunks) == 1:
        return chunks[0]
    first, last = chunks[0], chunks[-1]
    logprobs = deltas = None
    if any(chunk.logprobs is not None for chunk in chunks):
        logprobs = tuple(place for chunk in chunks for place in chunk.logprobs or ())
    if any(chunk.deltas is not None for chunk in chunks):
        deltas = tuple(delta for chunk in chunks for delta in chunk.deltas or ())
    return EngineChunk(
        text="".join([chunk.text for chunk in chunks]),
        token_ids=tuple([token for chunk in chunks for token in chunk.token_ids]),
        counts=last.counts,
        finish_reason=last.finish_reason,
        replica=first.replica,
        served_tokens=last.served_tokens,
        logprobs=logprobs,
        deltas=deltas,
        prompt_logprobs=first.prompt_logprobs,
        stop_reason=last.stop_reason,
        embedding=last.embedding,
        wants=last.wants,
    )


def tune(writer: asyncio.StreamWriter) -> None:
    """No delay for small frames, and a dead peer is noticed in about ten seconds."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        # Probes are not sent while something is unacknowledged; this is for then.
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_MS),
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def read_frame(reader: asyncio.StreamReader, most: int = FRAME_MAX_BYTES) -> bytes:
    """The next frame. Raises DecodeError for a long one, OSError or IncompleteReadError."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > most:
        raise msgspec.DecodeError(f"a frame of {length} bytes")
    return await reader.readexactly(length)


def write_frame(writer: asyncio.StreamWriter, content: bytes) -> None:
    """Send a frame, without waiting."""
    writer.write(framed(content))


def framed(content: bytes) -> bytes:
    """A frame as it travels."""
    return _LENGTH.pack(len(content)) + content


def failure_of(error: MarketError) -> Failure:
    """An error as it travels."""
    kind = type(error).__name__
    return Failure(kind, error.message, error.code, error.param, error.retry_after_s)


def error_of(failure: Failure) -> MarketError:
    """The error that was sent; EngineFailed if its kind is not known here."""
    found = getattr(errors, failure.kind, None)
    kind: type[MarketError] = EngineFailed
    if isinstance(found, type) and issubclass(found, MarketError):
        kind = found
    error: MarketError = kind(
        failure.message,
        code=failure.code,
        param=failure.param,
        retry_after_s=failure.retry_after_s,
    )
    return error
