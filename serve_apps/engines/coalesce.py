"""Fewer, larger chunks under load: each one costs the way through two processes."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence

from market.types import EngineChunk

PAUSE_PER_STREAM_S = 0.005
PAUSE_MAX_S = 0.1


def pause(streams: int) -> float:
    """Shortest time between two chunks of one stream while ``streams`` are under way, seconds.

    A single stream is passed on token by token; from 21 on a chunk comes ten times a second,
    which still reads as flowing.
    """
    return min(PAUSE_MAX_S, PAUSE_PER_STREAM_S * (streams - 1))


def merge(chunks: Sequence[EngineChunk]) -> EngineChunk:
    """Consecutive chunks as one: texts and tokens joined, counts and reason of the last."""
    if len(chunks) == 1:
        return chunks[0]
    last = chunks[-1]
    text = "".join(chunk.text for chunk in chunks)
    token_ids = tuple(token for chunk in chunks for token in chunk.token_ids)
    return EngineChunk(text, token_ids, last.counts, last.finish_reason)


async def coalesce(
    chunks: AsyncGenerator[EngineChunk, None], pause_s: Callable[[], float]
) -> AsyncGenerator[EngineChunk, None]:
    """The same stream with at most one chunk per pause. The first and the end are not delayed."""
    waiting: list[EngineChunk] = []
    arrived, ended = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        try:
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    waiting.append(chunk)
                    arrived.set()
        finally:
            ended.set()
            arrived.set()

    reader = asyncio.create_task(read())
    try:
        while True:
            await arrived.wait()
            arrived.clear()
            if waiting:
                merged = merge(waiting)
                waiting.clear()
                yield merged
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), pause_s())
            elif ended.is_set():
                break
            if ended.is_set():
                arrived.set()
        await reader
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
