"""How a gateway comes by money: never beyond it, never waiting in vain, nothing hoarded."""

import asyncio

import pytest

from market import pricing
from market.accounts import HoldResult, HoldStatus
from market.budgets import Allowance
from market.errors import InsufficientBalance, Overloaded, SpillsSpent
from market.fakes import FakeEngine
from market.slices import IDLE_S, MAX_AGE_S, Need, PurseKey
from market.slicing import refusal
from market.types import Budget, Period
from tests.gateways import Gateway, gateway, prepared
from tests.samples import CARD

KEY = PurseKey("acme", "tiny")
NEED = Need(10, 256, 900)
FIRST = NEED.first(CARD)


async def reserve(here, key=KEY, need=NEED):
    return await asyncio.wait_for(here.slices.reserve(key, need, CARD), 5)


def give_back(here, *reservations, charge_pico=0):
    for one in reservations:
        here.slices.settle(one, charge_pico)
        here.slices.release(one)


async def held(here):
    return (await here.ledger.balance("acme")).held_pico


@pytest.fixture
async def here():
    return await gateway(FakeEngine())


class TestReserve:
    async def test_of_many_at_once_asks_a_few_times(self, here):
        await asyncio.gather(*(reserve(here) for _ in range(100)))
        assert len(here.grants.asked) <= 5
        assert await held(here) >= 100 * FIRST

    async def test_one_by_one_is_without_a_call_most_of_the_time(self, here):
        for _ in range(200):
            give_back(here, await reserve(here), charge_pico=FIRST)
            here.clock.advance(0.01)
            await asyncio.sleep(0)
        assert len(here.grants.asked) < 20

    async def test_newcomer_at_the_very_end_of_a_grant_is_not_forgotten(self, here):
        """Whoever begins to wait while the last answer is taken in needs another question."""
        for _ in range(50):
            first = asyncio.create_task(reserve(here))
            for _ in range(5):
                await asyncio.sleep(0)
            rest = [asyncio.create_task(reserve(here)) for _ in range(10)]
            await asyncio.gather(first, *rest)

    async def test_waiter_that_comes_while_money_is_asked_for_ahead_is_served(self, here):
        real, gate = here.grants.grant, asyncio.Event()
        first = await reserve(here)

        async def slow(ask):
            await gate.wait()
            return await real(ask)

        here.grants.grant = slow
        here.slices.extend(KEY, first, 500)  # too much for the slice: it asks for more ahead
        first.slice.granted_pico = first.slice.bound_pico
        here.slices._renew(KEY, CARD, 1)
        await asyncio.sleep(0)
        waiting = asyncio.create_task(reserve(here))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.wait_for(waiting, 5)

    async def test_refusal_is_only_for_those_that_do_not_fit(self):
        here = await gateway(FakeEngine(), pricing.format_money(3 * FIRST + FIRST // 2))
        found = await asyncio.gather(*(reserve(here) for _ in range(5)), return_exceptions=True)
        refused = [r for r in found if isinstance(r, InsufficientBalance)]
        assert (len(found), len(refused)) == (5, 2)
        assert {r.code for r in refused} == {"in_flight_budget_exhausted"}

    @pytest.mark.parametrize(
        ("subject", "left", "kind"),
        [
            ("spill:lease-1", 5, SpillsSpent),
            ("spill:lease-1", 7, InsufficientBalance),  # the balance has less
            ("key-1", 5, InsufficientBalance),
        ],
    )
    @pytest.mark.parametrize(
        "status", [HoldStatus.EXCEEDS_BUDGET, HoldStatus.EXCEEDS_UNTIL_OTHERS_END]
    )
    def test_refusal_says_whether_it_is_for_its_own_cap(self, status, subject, left, kind):
        key = KEY._replace(cap=Budget("spill:lease-1", Period.DAY, 9))
        bound = Allowance(left, left, Period.DAY, None, subject)
        error = refusal(HoldResult(status, None, 5, bound), key, Need(10, 5, 5), CARD)
        assert type(error) is kind

    async def test_ledger_that_is_away_is_said_to_all_who_wait(self, here):
        async def away(_ask):
            raise Overloaded("the scheduler does not answer", retry_after_s=5)

        here.grants.grant = away
        found = await asyncio.gather(*(reserve(here) for _ in range(3)), return_exceptions=True)
        assert {type(error) for error in found} == {Overloaded}

    async def test_who_gives_up_while_waiting_leaves_nothing(self, here):
        real, gate = here.grants.grant, asyncio.Event()

        async def slow(ask):
            await gate.wait()
            return await real(ask)

        here.grants.grant = slow
        waiting = [asyncio.create_task(reserve(here)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        gate.set()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        give_back(here, *done[1:])
        await here.slices.close()
        assert await held(here) == 0


class TestGivingBack:
    async def test_idle_slice_ends_after_its_records_are_booked(self, here):
        one = await reserve(here)
        here.sink.next_seq = 5
        give_back(here, one)
        here.clock.advance(IDLE_S + 1)
        here.sink.next_seq = 4  # booked so far
        await here.slices._tidy(KEY)
        assert await held(here) > 0
        here.sink.next_seq = 5
        await here.slices._tidy(KEY)
        assert await held(here) == 0

    @pytest.mark.parametrize("there", [True, False])
    async def test_slice_whose_opening_was_never_answered_ends_too(self, here, there):
        real = here.grants.grant

        async def lost(ask):
            if there:
                await real(ask)
            raise Overloaded("no answer", retry_after_s=1)

        here.grants.grant = lost
        with pytest.raises(Overloaded):
            await reserve(here)
        assert (await held(here) > 0) is there
        here.clock.advance(IDLE_S + 1)
        await here.slices._tidy(KEY)
        assert await held(here) == 0

    async def test_slice_that_is_just_asked_for_is_not_idle(self, here):
        real, gate = here.grants.grant, asyncio.Event()
        give_back(here, await reserve(here))
        here.clock.advance(IDLE_S + 1)

        async def slow(ask):
            await gate.wait()
            return await real(ask)

        here.grants.grant = slow
        waiting = asyncio.create_task(reserve(here, need=Need(900, 100_000, 100_000)))
        for _ in range(3):
            await asyncio.sleep(0)
        await here.slices._tidy(KEY)
        gate.set()
        await asyncio.wait_for(waiting, 5)

    async def test_old_slice_is_replaced_though_it_is_in_use(self, here):
        one = await reserve(here)
        here.clock.advance(MAX_AGE_S + 1)
        await here.slices._tidy(KEY)
        other = await reserve(here)
        assert other.slice is not one.slice
        assert here.slices.extend(KEY, one, 1) or True
        give_back(here, one, other)
        await here.slices._tidy(KEY)
        assert len(await here.ledger.open_holds()) == 1

    async def test_what_a_burst_needed_returns(self, here):
        give_back(here, *await asyncio.gather(*(reserve(here) for _ in range(50))))
        before = await held(here)
        await here.slices._tidy(KEY)
        assert await held(here) < before / 5

    async def test_of_another_model_makes_room(self):
        here = await gateway(FakeEngine(), pricing.format_money(3 * FIRST))
        give_back(here, await reserve(here, PurseKey("acme", "other")))
        assert await held(here) == 3 * FIRST
        assert (await reserve(here)).pico == FIRST

    async def test_other_gateways_give_back_when_they_are_told(self):
        ledger = await prepared(pricing.format_money(3 * FIRST))
        one = await Gateway(FakeEngine(), ledger, name="gw0").start()
        two = await Gateway(FakeEngine(), ledger, name="gw1").start()
        give_back(one, await reserve(one))
        real = two.grants.grant

        async def grant(ask):
            result = await real(ask)
            if result.hold is None:
                assert result.status is HoldStatus.EXCEEDS_UNTIL_OTHERS_END
                # What SQL's ledger says, and what the scheduler then tells the others.
                result = type(result)(result.status, None, 0, elsewhere_pico=3 * FIRST)
                one.slices.recall({"acme"})
            return result

        two.grants.grant = grant
        assert (await reserve(two)).pico == FIRST


async def test_extensions_of_two_answers_do_not_count_each_others(here):
    """They draw on one reservation; each is told of its own tokens only."""
    one = await reserve(here)
    before = one.pico
    need = one.slice.granted_pico // CARD.output_pico
    got = await asyncio.gather(
        *(here.slices.extend_or_wait(KEY, one, need) for _ in range(3)),
    )
    assert one.pico - before == sum(got) * CARD.output_pico


async def test_extension_takes_what_is_left_and_then_nothing():
    here = await gateway(FakeEngine(), pricing.format_money(FIRST + 40 * CARD.output_pico))
    one = await reserve(here)
    assert await here.slices.extend_or_wait(KEY, one, 256) == 40
    assert await here.slices.extend_or_wait(KEY, one, 256) == 0
    assert one.pico == FIRST + 40 * CARD.output_pico
