"""The story of a token request, every way it can end, over fakes."""

import asyncio
from contextlib import aclosing

import pytest

from market import pricing
from market.errors import (
    ContextTooLong,
    EngineFailed,
    InsufficientBalance,
    MarketFault,
    NotFound,
    Overloaded,
    PermissionDenied,
)
from market.fakes import DirectSink, FakeClock, FakeEngine, FakeRoutes, MemoryLedger
from market.inference import Inference
from market.types import FinishReason, Principal, Role, Sampling, UsageQuality, UsageRecord
from tests.samples import ACME, CARD, ROUTE, deposit

PROMPT = tuple(range(10))


class Market:
    """A gateway's core over fakes."""

    def __init__(self, engine, balance="1"):
        self.engine, self._balance = engine, balance

    async def start(self):
        self.clock = FakeClock()
        self.ledger = MemoryLedger(self.clock)
        await self.ledger.create_tenant("acme")
        await self.ledger.create_provider("local")
        await self.ledger.add_rate_cards([CARD], only_new_models=False)
        if self._balance != "0":
            await self.ledger.transfer(deposit(self._balance))
        self.sink = DirectSink(self.ledger)
        await self.sink.start()
        self.routes = FakeRoutes(ROUTE, CARD, self.engine)
        self.inference = Inference(self.clock, self.ledger, self.sink, self.routes)
        return self

    async def ask(self, max_tokens=5, principal=ACME, prompt=PROMPT):
        route = await self.routes.route("tiny", principal)
        return await self.inference.admit(principal, route, prompt, Sampling(max_tokens))

    async def answer(self, **asked):
        admission = await self.ask(**asked)
        return [event async for event in self.inference.stream(admission)]

    async def settled(self):
        """(the one record, balance in pico) after everything came to rest."""
        await self.inference.drain()
        account = await self.ledger.balance("acme")
        assert account.held_pico == 0, "a hold was left open"
        assert len(self.ledger.records) == 1
        return self.ledger.records[0], account.balance_pico


async def market(engine=None, balance="1"):
    return await Market(engine or FakeEngine(), balance).start()


class TestFinished:
    async def test_yields_chunks_then_the_committed_record(self):
        here = await market(FakeEngine(cached_input_tokens=4))
        *chunks, record = await here.answer()
        assert "".join(chunk.text for chunk in chunks) == "0 1 2 3 4 "
        assert isinstance(record, UsageRecord)
        assert (record.input_tokens, record.cached_input_tokens, record.output_tokens) == (10, 4, 5)
        assert record.finish_reason is FinishReason.LENGTH

    async def test_balance_falls_by_exactly_the_charge(self):
        here = await market(FakeEngine(stop_after=3))
        await here.answer()
        record, balance = await here.settled()
        assert record.charge_pico == 10 * CARD.input_pico + 3 * CARD.output_pico
        assert balance == 10**12 - record.charge_pico
        assert record.finish_reason is FinishReason.STOP

    async def test_books_balance(self):
        here = await market()
        await here.answer()
        accounts = await here.ledger.accounts()
        debits = sum(account.debits_pico for account in accounts)
        assert debits == sum(account.credits_pico for account in accounts)

    async def test_cached_tokens_are_capped_at_the_input(self):
        here = await market(FakeEngine(cached_input_tokens=1_000_000))
        await here.answer()
        record, _ = await here.settled()
        assert record.cached_input_tokens == 10

    async def test_nonsense_of_a_replica_does_not_reach_the_books(self):
        here = await market(FakeEngine(cached_input_tokens=-(2**80)))
        await here.answer()
        record, _ = await here.settled()
        assert record.cached_input_tokens == 0

    async def test_engine_gets_the_tenant_as_cache_salt(self):
        here = await market()
        await here.answer()
        assert here.engine.requests[0].cache_salt == "acme"

    async def test_without_max_tokens_the_context_is_the_limit(self):
        here = await market(FakeEngine(stop_after=3))
        await here.answer(max_tokens=None)
        assert here.engine.requests[0].sampling.max_tokens == ROUTE.max_context_tokens - 10


class TestBudget:
    async def test_short_balance_ends_the_answer_and_is_never_overdrawn(self):
        first_block = pricing.format_money(pricing.ceiling(10, 300, CARD))
        here = await market(balance=first_block)
        await here.answer(max_tokens=900)
        record, balance = await here.settled()
        assert (record.finish_reason, record.output_tokens) == (FinishReason.BUDGET, 300)
        assert balance == 0

    async def test_refused_if_not_even_the_first_block_fits(self):
        here = await market(balance=pricing.format_money(pricing.ceiling(10, 255, CARD)))
        with pytest.raises(InsufficientBalance) as caught:
            await here.ask(max_tokens=900)
        assert caught.value.metadata["affordable_max_tokens"] == 255
        assert "max_tokens=255" in caught.value.message
        assert here.ledger.records == []

    async def test_empty_balance_is_refused(self):
        here = await market(balance="0")
        with pytest.raises(InsufficientBalance) as caught:
            await here.ask()
        assert caught.value.code == "insufficient_balance"

    async def test_money_held_by_others_is_worth_a_retry(self):
        here = await market(balance=pricing.format_money(pricing.ceiling(10, 5, CARD)))
        await here.ask()
        with pytest.raises(InsufficientBalance) as caught:
            await here.ask()
        assert caught.value.code == "in_flight_budget_exhausted"
        assert caught.value.retry_after_s == 1


class TestHangUp:
    async def test_bills_what_was_generated_and_aborts_the_engine(self):
        here = await market()
        async with aclosing(here.inference.stream(await here.ask())) as events:
            await anext(events)
            await anext(events)
        record, _ = await here.settled()
        assert record.finish_reason is FinishReason.CLIENT_DISCONNECT
        assert record.charge_pico == 10 * CARD.input_pico + 2 * CARD.output_pico
        assert here.engine.aborted == ["req-gw0-1-1"]

    async def test_before_the_first_token_costs_nothing(self):
        here = await market(FakeEngine(gate=asyncio.Semaphore(0)))
        admission = await here.ask()
        waiting = asyncio.ensure_future(anext(here.inference.stream(admission)))
        while not here.engine.requests:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        record, balance = await here.settled()
        assert (record.output_tokens, record.charge_pico, balance) == (0, 0, 10**12)
        assert here.engine.aborted

    async def test_while_the_record_is_committed_is_still_a_finished_answer(self):
        here = await market()
        committing = asyncio.Event()
        real_record = here.sink.record

        async def slow_record(record):
            await committing.wait()
            return await real_record(record)

        here.sink.record = slow_record
        events = here.inference.stream(await here.ask())
        for _ in range(5):
            await anext(events)
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        committing.set()
        record, _ = await here.settled()
        assert (record.finish_reason, record.output_tokens) == (FinishReason.LENGTH, 5)

    async def test_while_the_hold_is_asked_for_leaves_no_hold(self):
        here = await market()
        asked, answered = asyncio.Event(), asyncio.Event()
        real_open = here.ledger.open_hold

        async def slow_open(request):
            result = await real_open(request)
            asked.set()
            await answered.wait()
            return result

        here.ledger.open_hold = slow_open
        admitting = asyncio.ensure_future(here.ask())
        await asked.wait()
        admitting.cancel()
        await asyncio.gather(admitting, return_exceptions=True)
        answered.set()
        record, balance = await here.settled()
        assert (record.charge_pico, balance) == (0, 10**12)
        assert record.finish_reason is FinishReason.CLIENT_DISCONNECT


class TestFaults:
    async def test_before_the_first_token_is_retried_once_and_billed_once(self):
        here = await market(FakeEngine(fail_at=0, failures=1))
        *chunks, record = await here.answer()
        assert len(chunks) == 5
        assert [request.request_id for request in here.engine.requests] == [
            "req-gw0-1-1",
            "req-gw0-1-2",
        ]
        assert (await here.settled())[0] == record

    async def test_twice_before_the_first_token_is_an_error_and_free(self):
        here = await market(FakeEngine(fail_at=0))
        with pytest.raises(EngineFailed):
            await here.answer()
        record, balance = await here.settled()
        assert len(here.engine.requests) == 2
        assert record.finish_reason is FinishReason.PROVIDER_ERROR
        assert (record.charge_pico, balance) == (0, 10**12)

    async def test_after_the_first_token_is_not_retried_and_free(self):
        here = await market(FakeEngine(fail_at=2))
        with pytest.raises(EngineFailed):
            await here.answer()
        record, balance = await here.settled()
        assert len(here.engine.requests) == 1
        assert (record.output_tokens, record.charge_pico, balance) == (2, 0, 10**12)
        assert record.finish_reason is FinishReason.PROVIDER_ERROR

    async def test_engine_that_generates_too_much_is_our_fault(self):
        class Greedy(FakeEngine):
            async def generate(self, request):
                async for chunk in FakeEngine(stop_after=999).generate(
                    type(request)(request.request_id, PROMPT, Sampling(999), "")
                ):
                    yield chunk

        here = await market(Greedy())
        with pytest.raises(MarketFault):
            await here.answer(max_tokens=3)
        record, _ = await here.settled()
        assert (record.finish_reason, record.charge_pico) == (FinishReason.MARKET_FAULT, 0)

    async def test_gateway_that_dies_leaves_a_recovered_record(self):
        here = await market()
        await here.ask()
        await DirectSink(here.ledger).start()
        record, balance = await here.settled()
        assert record.usage_quality is UsageQuality.RECOVERED
        assert (record.finish_reason, record.charge_pico) == (FinishReason.MARKET_FAULT, 0)
        assert balance == 10**12

    async def test_replica_that_dies_after_its_last_chunk_has_answered(self):
        class DiesLate(FakeEngine):
            async def generate(self, request):
                async for chunk in super().generate(request):
                    yield chunk
                raise EngineFailed("too late")

        here = await market(DiesLate())
        *_, record = await here.answer()
        assert (record.finish_reason, len(here.engine.requests)) == (FinishReason.LENGTH, 1)
        assert record.charge_pico > 0

    async def test_ledger_that_does_not_answer_in_time_keeps_no_hold(self):
        here = await market()
        real_open, calls = here.ledger.open_hold, []

        async def booked_but_not_answered(request):
            calls.append(request)
            result = await real_open(request)
            if len(calls) == 1:
                raise Overloaded("no answer", retry_after_s=0.001)
            return result

        here.ledger.open_hold = booked_but_not_answered
        with pytest.raises(Overloaded):
            await here.ask()
        record, balance = await here.settled()
        assert (record.finish_reason, balance) == (FinishReason.MARKET_FAULT, 10**12)


class TestRejected:
    @pytest.mark.parametrize("max_tokens", [None, 1, 990])
    async def test_prompt_that_fills_the_context(self, max_tokens):
        here = await market()
        with pytest.raises(ContextTooLong):
            await here.ask(prompt=tuple(range(1000)), max_tokens=max_tokens)

    async def test_answer_that_does_not_fit(self):
        here = await market()
        with pytest.raises(ContextTooLong) as caught:
            await here.ask(max_tokens=991)
        assert caught.value.param == "max_tokens"
        await here.ask(max_tokens=990)

    @pytest.mark.parametrize("role", [Role.OPERATOR, Role.PROVIDER])
    async def test_keys_that_are_no_tenant(self, role):
        here = await market()
        with pytest.raises(PermissionDenied):
            await here.ask(principal=Principal("key-op", role, "x"))

    async def test_model_without_a_price(self):
        here = await market()
        here.routes.card = None
        with pytest.raises(NotFound):
            await here.ask()

    async def test_nothing_is_recorded(self):
        here = await market()
        with pytest.raises(ContextTooLong):
            await here.ask(max_tokens=10_000)
        assert here.ledger.records == []
        assert await here.ledger.open_holds() == []


async def test_durations_are_those_of_the_monotonic_clock():
    here = await market(FakeEngine(gate=asyncio.Semaphore(0)))
    admission = await here.ask(max_tokens=2)
    here.clock.advance(0.25)
    events = here.inference.stream(admission)
    first = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    here.clock.advance(0.5)
    here.engine.gate.release()
    await first
    here.clock.advance(1)
    here.engine.gate.release()
    _, record = [event async for event in events]
    assert (record.queue_ms, record.ttft_ms, record.duration_ms) == (250, 750, 1750)
