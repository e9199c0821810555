"""The connection between a gateway and a replica, over real sockets on this machine."""

import asyncio
import contextlib

import msgspec
import pytest

from market.credit import WHOLE_BLOCK_TOKENS, Credit, within
from market.errors import EngineFailed, InvalidRequest, Overloaded
from market.types import (
    EngineChunk,
    EngineRequest,
    FinishReason,
    Position,
    Sampling,
    TokenCounts,
    TokenLogprob,
)
from serve_apps.frames import Abort, Open, State, Taken, merge
from serve_apps.link import Address, Link, LinkServer, adopt

HOST = "127.0.0.1"


class Engine:
    """Tokens as fast as they are read, or one per ``go``; notices when it is given up."""

    def __init__(self, tokens=5, fails=None, paced=False):
        self.tokens, self.fails = tokens, fails
        self.go = asyncio.Event()
        self.paced = paced
        self.given_up = asyncio.Event()
        self.produced = 0

    async def generate(self, request, credit):
        try:
            async with contextlib.aclosing(within(self._chunks(request), credit)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            self.given_up.set()
            raise

    async def _chunks(self, request):
        for n in range(self.tokens):
            if self.paced:
                await self.go.wait()
                self.go.clear()
            else:
                await asyncio.sleep(0)
            if self.fails is not None and n == 2:
                raise self.fails
            self.produced = n + 1
            reason = FinishReason.STOP if n == self.tokens - 1 else None
            counts = TokenCounts(len(request.prompt_token_ids), 0, n + 1)
            yield EngineChunk(f"{n} ", (n,), counts, reason)


@contextlib.asynccontextmanager
async def linked(engine):
    server = LinkServer(engine.generate)
    await server.start(HOST)
    server.tell(State(True, 100))

    async def address():
        return Address(HOST, server.port, server.secret)

    link = Link(address)
    try:
        yield server, link
    finally:
        await server.stop(0)
        await link.close()


async def test_answer_that_is_not_streamed_comes_in_blocks_after_its_first_token():
    async with linked(Engine(tokens=100)) as (_, link):
        request = msgspec.structs.replace(ask(), stream=False)
        chunks = [chunk async for chunk in link.generate(request, Credit(10**6, final=True))]
    assert [token for chunk in chunks for token in chunk.token_ids] == list(range(100))
    assert len(chunks[0].token_ids) == 1
    assert len(chunks) <= 1 + -(-99 // WHOLE_BLOCK_TOKENS)
    assert chunks[-1].finish_reason is FinishReason.STOP


async def test_answer_that_is_not_streamed_waits_for_credit_like_others():
    async with linked(Engine(tokens=100)) as (_, link):
        request, credit = msgspec.structs.replace(ask(), stream=False), Credit(10)
        got = 0
        async for chunk in link.generate(request, credit):
            got += len(chunk.token_ids)
            if got >= credit.tokens or chunk.wants:
                credit.extend(credit.tokens + 10, final=False)
        assert got == 100


async def test_stream_aborted_in_the_frame_that_opened_it_leaves_nothing():
    async with linked(Engine()) as (server, link):
        writer = await link._connected()
        for number in range(1, 51):
            link._send(writer, Open(number, ask(number), 10, True))
            link._send(writer, Abort(number))
        link._send(writer, Open(99, ask(99), 10, True))
        await until(lambda: server.streams == 0)


def ask(number=0):
    return EngineRequest(f"r{number}", (1, 2, 3), Sampling(100), "acme")


async def read(link, credit=None, number=0):
    credit = credit or Credit(10**6, final=True)
    return [chunk async for chunk in link.generate(ask(number), credit)]


def text(chunks):
    return "".join(chunk.text for chunk in chunks)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_an_answer_arrives_whole_and_in_order():
    async with linked(Engine(50)) as (_, link):
        chunks = await read(link)
    assert text(chunks) == "".join(f"{n} " for n in range(50))
    assert [token for chunk in chunks for token in chunk.token_ids] == list(range(50))
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].counts == TokenCounts(3, 0, 50)


async def test_many_answers_share_one_connection():
    async with linked(Engine(40)) as (server, link):
        answers = await asyncio.gather(*(read(link, number=n) for n in range(64)))
        assert len(server._peers) == 1
    assert {text(chunks) for chunks in answers} == {"".join(f"{n} " for n in range(40))}


async def test_tokens_are_single_while_there_is_time():
    engine = Engine(4, paced=True)
    async with linked(engine) as (_, link):
        reading = asyncio.create_task(read(link))
        for n in range(4):
            engine.go.set()
            await until(lambda n=n: engine.produced == n + 1)
            await asyncio.sleep(0.02)
        chunks = await reading
    assert [len(chunk.token_ids) for chunk in chunks] == [1, 1, 1, 1]


async def test_a_slow_reader_gets_fewer_larger_chunks_and_nothing_piles_up():
    engine = Engine(5000)
    async with linked(engine) as (_, link):
        stream = link.generate(ask(), Credit(10**6, final=True))
        first = await anext(stream)
        await until(lambda: engine.produced == 5000)
        rest = [chunk async for chunk in stream]
    assert len(first.token_ids) + sum(len(chunk.token_ids) for chunk in rest) == 5000
    assert len(rest) < 100


async def test_credit_is_passed_on():
    engine = Engine(10)
    credit = Credit(3)
    async with linked(engine) as (_, link):
        reading = asyncio.create_task(read(link, credit))
        await until(lambda: engine.produced == 4)
        await asyncio.sleep(0.02)
        assert not reading.done()  # the fourth token is not paid for
        credit.extend(6)
        await asyncio.sleep(0.02)
        credit.extend(6, final=True)
        chunks = await reading
    assert text(chunks) == "0 1 2 3 4 5 "
    assert chunks[-1].finish_reason is FinishReason.LENGTH


async def test_closing_the_reader_aborts_the_engine():
    engine = Engine(10, paced=True)
    async with linked(engine) as (server, link):
        async with contextlib.aclosing(link.generate(ask(), Credit(100, final=True))) as chunks:
            engine.go.set()
            await anext(chunks)
        await asyncio.wait_for(engine.given_up.wait(), 5)
        await until(lambda: server.streams == 0)
        assert link.streams == 0


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (Overloaded("full", retry_after_s=3.0), Overloaded),
        (InvalidRequest("a broken grammar", param="response_format"), InvalidRequest),
        (EngineFailed("out of memory"), EngineFailed),
    ],
)
async def test_failures_arrive_as_they_are(raised, expected):
    async with linked(Engine(fails=raised)) as (_, link):
        with pytest.raises(expected) as caught:
            await read(link)
    error = caught.value
    assert (error.message, error.code, error.param, error.retry_after_s) == (
        raised.message,
        raised.code,
        raised.param,
        raised.retry_after_s,
    )


async def test_a_bug_in_the_engine_is_a_failed_engine(caplog):
    async with linked(Engine(fails=ZeroDivisionError("oops"))) as (_, link):
        with pytest.raises(EngineFailed, match="ZeroDivisionError"):
            await read(link)


async def test_without_the_secret_nothing_is_served(monkeypatch):
    monkeypatch.setattr("serve_apps.link.REPLICA_TIMEOUT_S", 0.3)
    engine = Engine()
    async with linked(engine) as (server, _):

        async def address():
            return Address(HOST, server.port, "guessed")

        stranger = Link(address)
        with pytest.raises(EngineFailed, match="cannot be reached"):
            await read(stranger)
        await stranger.close()
    assert engine.produced == 0


async def test_an_oversized_frame_ends_the_connection_only():
    async with linked(Engine()) as (server, link):
        _, writer = await asyncio.open_connection(HOST, server.port)
        writer.write(b"\xff\xff\xff\xff" + b"x" * 100)
        await writer.drain()
        assert len(await read(link)) > 0
        writer.close()


async def test_a_lost_replica_fails_its_answers_and_the_next_connects_anew():
    engine = Engine(10, paced=True)
    async with linked(engine) as (server, link):
        reading = asyncio.create_task(read(link))
        engine.go.set()
        await until(lambda: engine.produced == 1)
        for peer in list(server._peers):
            peer._writer.transport.abort()
        with pytest.raises(EngineFailed, match="gone"):
            await reading
        await until(lambda: engine.given_up.is_set())
        await until(lambda: link.connected)  # by itself, before anybody asks
        engine.paced = False
        assert text(await read(link, number=1)).startswith("0 1 ")


async def test_many_who_wait_for_a_lost_replica_share_one_attempt(monkeypatch):
    monkeypatch.setattr("serve_apps.link.REPLICA_TIMEOUT_S", 0.1)
    asked = 0

    async def address():
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()

    link = Link(address)
    waiting = [read(link, number=n) for n in range(20)]
    outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
    assert {type(outcome) for outcome in outcomes} == {EngineFailed}
    assert asked == 1


async def test_closing_the_link_fails_those_who_wait_for_it():
    link = Link(lambda: asyncio.Event().wait())
    waiting = asyncio.create_task(read(link))
    await asyncio.sleep(0.01)
    await link.close()
    with pytest.raises(EngineFailed, match="gone"):
        await waiting


async def test_who_gives_up_waiting_is_cancelled():
    link = Link(lambda: asyncio.Event().wait())
    waiting = asyncio.create_task(read(link))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await link.close()


async def test_nobody_listens(monkeypatch):
    monkeypatch.setattr("serve_apps.link.REPLICA_TIMEOUT_S", 0.3)

    async def address():
        return Address(HOST, 1, "x")

    with pytest.raises(EngineFailed, match="cannot be reached"):
        await read(Link(address))


async def test_one_that_died_is_found_again_where_it_is_then():
    async with linked(Engine(3)) as (server, _):
        died, known = Address(HOST, 1, "x"), []

        async def address():
            known.append(died if not known else Address(HOST, server.port, server.secret))
            return known[-1]

        another = Link(address)
        assert text(await read(another)) == "0 1 2 "
        await another.close()
    assert len(known) == 2


async def test_process_is_told_what_to_load():
    told = []
    server = LinkServer(Engine().generate, told.append)
    await server.start(HOST)
    entry = Address(HOST, server.port, server.secret).pack()
    settings = {"model": "tiny-qwen", "place": {"gpu_indices": [0]}}
    await asyncio.to_thread(adopt, entry, settings)
    assert told == [settings]
    stranger = Address(HOST, server.port, "guessed").pack()
    await asyncio.to_thread(adopt, stranger, settings)
    assert told == [settings]
    await server.stop(0)


async def test_a_replica_that_leaves_ends_its_answers_and_takes_no_more():
    engine = Engine(3, paced=True)
    async with linked(engine) as (server, link):
        reading = asyncio.create_task(read(link))
        await until(lambda: server.streams == 1)
        stopping = asyncio.create_task(server.stop(5))
        await asyncio.sleep(0.02)
        with pytest.raises(Overloaded, match="going down"):
            await read(link, number=1)
        for n in range(3):
            engine.go.set()
            await until(lambda n=n: engine.produced == n + 1)
        assert text(await reading) == "0 1 2 "
        await stopping


async def test_borrowed_places_are_counted_apart():
    engine = Engine(2, paced=True)
    async with linked(engine) as (_, link):
        asked = [msgspec.structs.replace(ask(n), borrowed=n > 0) for n in range(3)]
        credit = Credit(10**6, final=True)
        streams = [link.generate(request, credit) for request in asked]
        reading = [asyncio.create_task(anext(stream)) for stream in streams]
        await until(lambda: link.streams == 3)
        assert link.borrowed == 2
        for task in reading:
            task.cancel()
        await until(lambda: link.streams == 0)
        assert link.borrowed == 0


async def slow_to_take(link, monkeypatch, after_s):
    """It connects, and says so long after each frame that it has passed it on."""
    await link._connected()
    send = link._send

    def later(writer, asked):
        wait_s = after_s if isinstance(asked, Taken) else 0
        asyncio.get_running_loop().call_later(wait_s, send, writer, asked)

    monkeypatch.setattr(link, "_send", later)


async def test_a_replica_that_leaves_waits_until_ends_of_answers_are_taken(monkeypatch):
    engine = Engine(50)
    async with linked(engine) as (server, link):
        await slow_to_take(link, monkeypatch, 0.1)
        reading = asyncio.create_task(read(link))
        await until(lambda: engine.produced == 50)
        await server.stop(5)
        for peer in list(server._peers):  # its process ends
            peer._writer.transport.abort()
        chunks = await asyncio.wait_for(reading, 5)
    assert text(chunks) == "".join(f"{n} " for n in range(50))
    assert chunks[-1].finish_reason is FinishReason.STOP


async def test_a_gateway_that_takes_nothing_holds_a_replica_up_no_longer_than_its_patience(
    monkeypatch,
):
    engine = Engine(50)
    async with linked(engine) as (server, link):
        await slow_to_take(link, monkeypatch, 3600)
        reading = asyncio.create_task(read(link))
        await until(lambda: engine.produced == 50)
        await asyncio.wait_for(server.stop(0.1), 5)
        reading.cancel()


def test_merging_joins_what_accumulates_and_keeps_the_last_counts():
    place = Position(TokenLogprob(1, "a", -0.5))
    chunks = [
        EngineChunk("a", (1,), TokenCounts(3, 1, 1), None, replica="x", logprobs=(place,)),
        EngineChunk("b", (2,), TokenCounts(3, 1, 2), None, deltas=(b"{}",)),
        EngineChunk("", (), TokenCounts(3, 1, 2), FinishReason.STOP, stop_reason="b"),
    ]
    merged = merge(chunks)
    assert (merged.text, merged.token_ids, merged.counts) == ("ab", (1, 2), TokenCounts(3, 1, 2))
    assert (merged.finish_reason, merged.stop_reason, merged.replica) == ("stop", "b", "x")
    assert (merged.logprobs, merged.deltas) == ((place,), (b"{}",))
    assert merge(chunks[:1]) is chunks[0]
