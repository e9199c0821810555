"""An answer is cut at exactly the last token that was paid for."""

import asyncio

import pytest

from market.credit import Credit, within
from market.types import EngineChunk, FinishReason, TokenCounts


async def engine(*sizes, finish=FinishReason.STOP, closed=None):
    """Chunks of so many tokens each; ``finish`` with the last."""
    produced = 0
    try:
        for index, size in enumerate(sizes):
            produced += size
            reason = finish if index == len(sizes) - 1 else None
            tokens = tuple(range(produced - size, produced))
            yield EngineChunk("x" * size, tokens, TokenCounts(7, 3, produced), reason)
    finally:
        if closed is not None:
            closed.append(True)


async def read(chunks):
    return [chunk async for chunk in chunks]


def produced(chunks):
    return sum(len(chunk.token_ids) for chunk in chunks)


async def test_enough_credit_changes_nothing():
    chunks = await read(within(engine(1, 1, 3), Credit(5, final=True)))
    assert [len(chunk.token_ids) for chunk in chunks] == [1, 1, 3]
    assert chunks[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("credit", [1, 2, 3, 4])
async def test_final_credit_cuts_with_length_and_the_counts_of_what_was_given(credit):
    closed = []
    chunks = await read(within(engine(1, 1, 1, 1, 1, closed=closed), Credit(credit, final=True)))
    assert produced(chunks) == credit
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert chunks[-1].counts == TokenCounts(7, 3, credit)
    assert closed  # the engine works no further


async def test_a_chunk_that_does_not_fit_is_left_out_as_a_whole():
    chunks = await read(within(engine(2, 3), Credit(4, final=True)))
    assert produced(chunks) == 2
    assert chunks[-1].counts.output_tokens == 2
    (only,) = await read(within(engine(3), Credit(2, final=True)))
    assert (only.finish_reason, only.counts) == (FinishReason.LENGTH, TokenCounts(7, 3, 0))


async def test_it_waits_for_more_credit_and_goes_on():
    credit = Credit(2)
    seen = []

    async def reader():
        async for chunk in within(engine(1, 1, 1, 1), credit):
            seen.append(chunk)

    reading = asyncio.create_task(reader())
    for _ in range(10):
        await asyncio.sleep(0)
    assert produced(seen) == 2
    credit.extend(3)
    for _ in range(10):
        await asyncio.sleep(0)
    assert produced(seen) == 3
    credit.extend(1)  # older news
    credit.extend(3, final=True)
    await reading
    assert produced(seen) == 3
    assert seen[-1].finish_reason is FinishReason.LENGTH


async def test_a_large_chunk_says_what_it_wants_and_stands_still():
    credit = Credit(4)
    chunks = within(engine(3, 5), credit)
    assert len((await anext(chunks)).token_ids) == 3
    hungry = await anext(chunks)
    assert (hungry.token_ids, hungry.wants, hungry.counts) == ((), 8, TokenCounts(7, 3, 3))
    credit.extend(6)  # not enough yet
    assert (await anext(chunks)).wants == 8
    credit.extend(8)
    assert len((await anext(chunks)).token_ids) == 5


async def test_whoever_is_far_away_is_told_of_every_extension():
    credit, told = Credit(1), []
    credit.on_extend = lambda: told.append((credit.tokens, credit.final))
    credit.extend(5)
    credit.extend(5, final=True)
    assert told == [(5, False), (5, True)]


async def test_an_engine_that_ends_without_a_reason_is_passed_on_as_it_is():
    chunks = await read(within(engine(1, finish=None), Credit(9, final=True)))
    assert [chunk.finish_reason for chunk in chunks] == [None]
