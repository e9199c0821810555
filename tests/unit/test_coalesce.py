import asyncio
from contextlib import aclosing

import pytest

from market.errors import EngineFailed
from market.fakes import FakeEngine
from market.types import EngineRequest, FinishReason, Sampling
from serve_apps.engines.coalesce import coalesce, pause

REQUEST = EngineRequest("r", (1, 2, 3), Sampling(20), "")


async def collect(engine, pause_s=0.0):
    chunks = []
    async with aclosing(coalesce(engine.generate(REQUEST), lambda: pause_s)) as stream:
        async for chunk in stream:
            chunks.append(chunk)
    return chunks


async def test_nothing_is_lost_and_the_end_is_last():
    chunks = await collect(FakeEngine(), pause_s=0.001)
    assert [token for chunk in chunks for token in chunk.token_ids] == list(range(20))
    assert "".join(chunk.text for chunk in chunks) == "".join(f"{n} " for n in range(20))
    assert [chunk.finish_reason for chunk in chunks][-1] is FinishReason.LENGTH
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert chunks[-1].counts.output_tokens == 20


async def test_what_arrives_during_a_pause_comes_as_one_chunk():
    gate = asyncio.Semaphore(1)
    engine = FakeEngine(gate=gate)
    async with aclosing(coalesce(engine.generate(REQUEST), lambda: 60.0)) as stream:
        first = await anext(stream)
        for _ in range(19):
            gate.release()
        second = await anext(stream)
    assert (len(first.token_ids), len(second.token_ids)) == (1, 19)


async def test_failure_comes_after_what_was_generated():
    got = []

    async def read():
        async for chunk in coalesce(FakeEngine(fail_at=3).generate(REQUEST), lambda: 0.0):
            got.extend(chunk.token_ids)

    with pytest.raises(EngineFailed):
        await read()
    assert got == [0, 1, 2]


async def test_closing_aborts_the_engine():
    engine = FakeEngine(gate=asyncio.Semaphore(2))
    async with aclosing(coalesce(engine.generate(REQUEST), lambda: 0.0)) as stream:
        await anext(stream)
    assert engine.aborted == ["r"]


def test_a_single_stream_is_not_held_back():
    assert pause(1) == 0
    assert 0 < pause(8) < pause(32) == 0.1
