"""The story of a token request, every way it can end, over fakes."""

import asyncio
import dataclasses
from contextlib import aclosing

import msgspec
import pytest

from market import pricing
from market.credit import Credit
from market.errors import (
    ContextTooLong,
    EngineFailed,
    InsufficientBalance,
    MarketFault,
    NoCapacity,
    NotFound,
    Overloaded,
    PermissionDenied,
)
from market.fakes import FakeEngine
from market.metering import Ask
from market.routing import Choice
from market.types import (
    FinishReason,
    Grammar,
    GrammarKind,
    Lane,
    Loan,
    Principal,
    Role,
    Sampling,
    UsageQuality,
    UsageRecord,
)
from tests.gateways import PROMPT, gateway
from tests.samples import ACME, CARD, ROUTE


async def market(engine=None, balance="1"):
    return await gateway(engine or FakeEngine(), balance)


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


class TestMarketTrouble:
    async def test_money_that_cannot_be_asked_for_is_our_fault_not_the_tenants(self):
        here = await market()
        admission = await here.ask(max_tokens=900)

        async def away(_ask):
            raise Overloaded("the ledger does not answer")

        here.grants.grant = away
        with pytest.raises(Overloaded):
            _ = [event async for event in here.inference.stream(admission)]
        await here.inference.drain()
        (record,) = here.ledger.records
        assert (record.finish_reason, record.charge_pico) == (FinishReason.MARKET_FAULT, 0)

    async def test_full_replica_is_left_for_another(self):
        class Full(FakeEngine):
            async def generate(self, request, credit=None):
                if request.request_id.endswith("-1"):
                    raise Overloaded("the replica's queue is full")
                async for chunk in super().generate(request, credit):
                    yield chunk

        here = await market(Full())
        *_, record = await here.answer()
        assert record.output_tokens == 5


class TestHangUp:
    async def test_bills_no_prompt_that_was_not_begun(self):
        here = await market()
        admission = await here.ask(prompts=(PROMPT,) * 64)
        async with aclosing(here.inference.stream(admission)) as events:
            first = await anext(events)
        record, _ = await here.settled()
        assert record.finish_reason is FinishReason.CLIENT_DISCONNECT
        assert record.input_tokens == len(PROMPT) * len({first.index})

    async def test_bills_what_was_generated_and_aborts_the_engine(self):
        here = await market()
        async with aclosing(here.inference.stream(await here.ask())) as events:
            await anext(events)
            await anext(events)
        record, _ = await here.settled()
        assert record.finish_reason is FinishReason.CLIENT_DISCONNECT
        assert record.charge_pico == 10 * CARD.input_pico + 2 * CARD.output_pico
        assert here.engine.aborted == ["req-gw0-1-0-1"]

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

    async def test_while_money_is_asked_for_leaves_nothing(self):
        here = await market()
        asked, answered = asyncio.Event(), asyncio.Event()
        real_grant = here.grants.grant

        async def slow_grant(ask):
            asked.set()
            await answered.wait()
            return await real_grant(ask)

        here.grants.grant = slow_grant
        admitting = asyncio.ensure_future(here.ask())
        await asked.wait()
        admitting.cancel()
        await asyncio.gather(admitting, return_exceptions=True)
        answered.set()
        here.grants.grant = real_grant
        await here.answer()
        record, balance = await here.settled()
        assert balance == 10**12 - record.charge_pico

    async def test_while_it_waits_for_a_place_gives_everything_back(self):
        here = await market(FakeEngine(gate=asyncio.Semaphore(0)))
        here.routes._route = dataclasses.replace(ROUTE, places=1)
        first = here.inference.stream(await here.ask())
        running = asyncio.ensure_future(anext(first))
        while not here.engine.requests:
            await asyncio.sleep(0)
        second = asyncio.ensure_future(anext(here.inference.stream(await here.ask())))
        while here.queues.waiting()["tiny"] != (1, 1):
            await asyncio.sleep(0)
        for task in (second, running):
            task.cancel()
        await asyncio.gather(second, running, return_exceptions=True)
        await here.rest()
        assert here.queues.waiting()["tiny"] == (0, 0)
        assert [r.charge_pico for r in here.ledger.records] == [0, 0]
        assert (await here.ledger.balance("acme")).held_pico == 0


class TestFaults:
    async def test_before_the_first_token_is_retried_once_and_billed_once(self):
        here = await market(FakeEngine(fail_at=0, failures=1))
        *chunks, record = await here.answer()
        assert len(chunks) == 5
        assert [request.request_id for request in here.engine.requests] == [
            "req-gw0-1-0-1",
            "req-gw0-1-0-2",
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
            async def generate(self, request, credit):
                more = msgspec.structs.replace(request, sampling=Sampling(999))
                async for chunk in super().generate(more, Credit(999, final=True)):
                    yield chunk

        here = await market(Greedy())
        with pytest.raises(MarketFault):
            await here.answer(max_tokens=3)
        record, _ = await here.settled()
        assert (record.finish_reason, record.charge_pico) == (FinishReason.MARKET_FAULT, 0)

    async def test_gateway_that_dies_leaves_a_recovered_record(self):
        here = await market()
        await here.ask()
        await here.sink.recover()
        (record,) = here.ledger.records
        balance = (await here.ledger.balance("acme")).available_pico
        assert record.usage_quality is UsageQuality.RECOVERED
        assert (record.finish_reason, record.charge_pico) == (FinishReason.MARKET_FAULT, 0)
        assert balance == 10**12

    async def test_replica_that_dies_after_its_last_chunk_has_answered(self):
        class DiesLate(FakeEngine):
            async def generate(self, request, credit):
                async for chunk in super().generate(request, credit):
                    yield chunk
                raise EngineFailed("too late")

        here = await market(DiesLate())
        *_, record = await here.answer()
        assert (record.finish_reason, len(here.engine.requests)) == (FinishReason.LENGTH, 1)
        assert record.charge_pico > 0

    async def test_lost_answer_to_a_grant_loses_no_money(self):
        here = await market()
        real_grant, calls = here.grants.grant, []

        async def booked_but_not_answered(ask):
            calls.append(ask)
            result = await real_grant(ask)
            if len(calls) == 1:
                raise Overloaded("no answer", retry_after_s=0.001)
            return result

        here.grants.grant = booked_but_not_answered
        with pytest.raises(Overloaded):
            await here.ask()
        await here.answer()
        assert calls[1].opens.hold_id == calls[0].opens.hold_id
        record, balance = await here.settled()
        assert balance == 10**12 - record.charge_pico


class TestBlocks:
    """Money follows the answer block by block."""

    async def test_long_answer_is_paid_as_it_grows(self):
        here = await market()
        admission = await here.ask(max_tokens=900)
        assert admission.reservation.pico == pricing.ceiling(10, 256, CARD)
        *chunks, record = [event async for event in here.inference.stream(admission)]
        assert (len(chunks), record.finish_reason) == (900, FinishReason.LENGTH)
        assert record.charge_pico == pricing.ceiling(10, 900, CARD)

    async def test_answer_waits_for_a_block_that_is_being_asked_for(self):
        here = await market()
        admission = await here.ask(max_tokens=900)
        admission.reservation.slice.granted_pico = admission.reservation.slice.bound_pico
        *chunks, record = [event async for event in here.inference.stream(admission)]
        assert (len(chunks), record.finish_reason) == (900, FinishReason.LENGTH)

    async def test_several_answers_share_the_prompt_and_pay_for_each(self):
        here = await market(FakeEngine(cached_input_tokens=10))
        *chunks, record = await here.answer(max_tokens=300, answers=3)
        assert {chunk.index for chunk in chunks} == {0, 1, 2}
        assert (record.input_tokens, record.output_tokens) == (10, 900)
        assert record.cached_input_tokens == 10

    async def test_several_prompts_are_one_request(self):
        here = await market()
        *chunks, record = await here.answer(prompts=((1, 2), (3, 4, 5)), answers=2)
        assert {chunk.index for chunk in chunks} == {0, 1, 2, 3}
        assert (record.input_tokens, record.output_tokens) == (5, 20)
        assert len(here.ledger.records) == 1

    async def test_seeds_differ_between_answers_to_one_prompt(self):
        here = await market()
        route = await here.routes.route("tiny", ACME)
        ask = Ask((PROMPT,), Sampling(1, seed=7), answers=3)
        admission = await here.inference.admit(ACME, Choice(route), ask)
        [event async for event in here.inference.stream(admission)]
        assert sorted(r.sampling.seed for r in here.engine.requests) == [7, 8, 9]

    async def test_one_failing_answer_makes_the_request_free(self):
        here = await market(FakeEngine(fail_at=2, failures=1))
        with pytest.raises(EngineFailed):
            await here.answer(answers=3)
        record, balance = await here.settled()
        assert (record.charge_pico, balance) == (0, 10**12)


async def test_tokens_on_a_lease_cost_nothing_and_ask_for_no_money():
    here = await market(balance="0")
    here.routes._route = dataclasses.replace(ROUTE, lane=Lane.LEASE, lease_id="lease-1")
    *_, record = await here.answer()
    assert (record.charge_pico, record.slice_id, record.lease_id) == (0, None, "lease-1")
    assert here.grants.asked == []


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


class TestBorrowedPlace:
    """A lease's idle replica serves a request of its model's pool, until its holder wants it."""

    LENT = dataclasses.replace(
        ROUTE, app_name="lent", node_id="elsewhere", loan=Loan("lease-1", "lender")
    )

    async def lent(self, **engine):
        here = await market(FakeEngine(**engine))
        here.routes.lent = self.LENT
        return here

    async def test_is_recorded_as_lent_at_the_price_of_the_pool(self):
        here = await self.lent()
        await here.answer()
        record, balance = await here.settled()
        assert (record.lane, record.lease_id, record.node_id) == (
            Lane.TOKENS,
            "lease-1",
            "elsewhere",
        )
        assert dict(record.attrs)["lent_by"] == "lender"
        assert record.charge_pico == 10 * CARD.input_pico + 5 * CARD.output_pico
        assert balance == 10**12 - record.charge_pico

    async def test_goes_on_elsewhere_at_the_very_token_and_nobody_notices(self):
        here = await self.lent(revoke_at=3)
        *chunks, record = await here.answer(max_tokens=7)
        assert "".join(chunk.text for chunk in chunks) == "0 1 2 3 4 5 6 "
        first, second = here.engine.requests
        assert (first.borrowed, first.resumed) == (True, 0)
        assert (second.borrowed, second.resumed) == (False, 3)
        assert second.prompt_token_ids == (*PROMPT, 0, 1, 2)
        assert (record.input_tokens, record.output_tokens) == (10, 7)
        assert record.claimed_output_tokens == 7
        assert record.finish_reason is FinishReason.LENGTH
        assert "lent_by" not in dict(record.attrs)  # whose holder took it back earns nothing
        assert record.node_id == ROUTE.node_id

    async def test_is_refused_before_the_first_token_and_served_by_the_pool(self):
        here = await self.lent(revoke_at=0)
        *_, record = await here.answer()
        assert (record.output_tokens, here.routes.moves) == (5, 1)

    async def test_money_that_ends_on_the_way_ends_the_answer_at_the_same_token(self):
        first_block = pricing.format_money(pricing.ceiling(10, 300, CARD))
        here = await market(FakeEngine(revoke_at=200), balance=first_block)
        here.routes.lent = self.LENT
        await here.answer(max_tokens=900)
        record, balance = await here.settled()
        assert (record.finish_reason, record.output_tokens) == (FinishReason.BUDGET, 300)
        assert balance == 0

    @pytest.mark.parametrize(
        "more",
        [
            {"answers": 2},
            {"grammar": Grammar(GrammarKind.JSON_OBJECT, "")},
            {"chat": b"{}"},
            {"sampling": Sampling(5, seed=1)},
            {"sampling": Sampling(5, stop=("x",))},
            {"sampling": Sampling(5, presence_penalty=0.5)},
            {"sampling": Sampling(5, logprobs=1)},
        ],
        ids=str,
    )
    async def test_answers_that_cannot_go_on_elsewhere_do_not_borrow(self, more):
        ask = Ask((PROMPT,), **({"sampling": Sampling(5)} | more))
        assert not ask.can_move
        assert Ask((PROMPT,), Sampling(5, temperature=0.3, top_p=0.9)).can_move
        here = await self.lent()
        admission = await here.inference.admit(ACME, Choice(ROUTE), ask)
        async for _ in here.inference.stream(admission):
            pass
        assert not any(request.borrowed for request in here.engine.requests)

    async def test_where_only_a_lease_is_there_they_wait_for_the_pool(self):
        here = await self.lent()
        ask = Ask((PROMPT,), Sampling(5, seed=1))
        admission = await here.inference.admit(ACME, Choice(self.LENT), ask)
        async for _ in here.inference.stream(admission):
            pass
        assert here.routes.moves == 1
        assert not here.engine.requests[0].borrowed

    async def test_request_on_a_lease_of_ones_own_borrows_nothing(self):
        """It is paid by the hour: on somebody else's lease, or the pool, it would be free."""
        here = await self.lent()
        own = dataclasses.replace(ROUTE, lane=Lane.LEASE, lease_id="lease-2")
        admission = await here.inference.admit(
            ACME, Choice(own), Ask((PROMPT,), Sampling(5, temperature=0.5))
        )
        async for _ in here.inference.stream(admission):
            pass
        record, _ = await here.settled()
        assert (record.lease_id, "lent_by" in dict(record.attrs)) == ("lease-2", False)

    async def test_lease_that_dies_is_left_like_one_that_is_taken_back(self):
        here = await self.lent(fail_at=2, failures=1)
        *chunks, record = await here.answer()
        assert "".join(chunk.text for chunk in chunks) == "0 1 2 3 4 "
        assert (record.output_tokens, here.routes.moves) == (5, 1)

    async def test_who_finds_nowhere_to_go_on_is_told_so_in_the_end(self):
        here = await self.lent(revoke_at=2)

        async def nowhere(route, principal, *, borrows):
            here.clock.advance(100)
            return self.LENT

        here.routes.elsewhere = nowhere
        with pytest.raises(NoCapacity):
            await here.answer()
        record, balance = await here.settled()
        assert (record.charge_pico, balance) == (0, 10**12)
