"""One suite for everything that keeps the books: the fake in memory and the real one over SQL."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec
import pytest

from market.accounts import CASH, HoldState, HoldStatus, provider_account, tenant_account
from market.config import Config
from market.errors import Conflict, InvalidRequest, MarketError, NotFound
from market.fakes import FakeClock, MemoryLedger
from market.ledger.schema import encode_batch
from market.ledger.service import Ledger
from market.pricing import charge
from market.types import FinishReason, HoldChange, Lane, TokenCounts
from tests.samples import CARD, deposit, hold_request, token_record

COUNTS = TokenCounts(100, 40, 10)
CHARGE = charge(COUNTS, CARD, FinishReason.STOP, hold_request().lane)
WANTED = {"wanted_pico": 2 * CHARGE, "minimum_pico": CHARGE}


class SqlLedger(Ledger):
    """The real one, taking records as the fake does."""

    async def append_records(self, producer, epoch, first_seq, records):
        return await self.append(producer, epoch, first_seq, encode_batch(records))


def record(request, reason=FinishReason.STOP, counts=COUNTS, **changes):
    """A record that draws on a hold; its request has the hold's name unless told otherwise."""
    return token_record(
        request,
        counts=counts,
        charge_pico=charge(counts, CARD, reason, request.lane),
        finish_reason=reason,
        **changes,
    )


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
async def ledger(request, tmp_path) -> AsyncIterator[MemoryLedger | SqlLedger]:
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "memory":
            ledger = MemoryLedger(FakeClock())
        else:
            url = None
            if request.param == "postgresql":
                url = request.getfixturevalue("postgres_url")
            config = Config(tmp_path, "http://127.0.0.1:1", url)
            ledger = SqlLedger(config, FakeClock(), on_fatal=lambda: None)
            await ledger.open()
            stack.push_async_callback(ledger.close)
        await ledger.create_tenant("acme")
        await ledger.create_provider("local")
        await ledger.add_rate_cards([CARD], only_new_models=False)
        await ledger.transfer(deposit("10"))
        yield ledger


async def held(ledger, hold_id="slice-1", epoch=1):
    request = hold_request(hold_id, epoch=epoch, **WANTED)
    await ledger.open_hold(request)
    return request


async def balances(ledger):
    accounts = {account.account_id: account for account in await ledger.accounts()}
    debits = sum(account.debits_pico for account in accounts.values())
    assert debits == sum(account.credits_pico for account in accounts.values())
    return accounts


class TestTenants:
    async def test_creating_one_twice_keeps_its_money(self, ledger):
        assert await ledger.create_tenant("acme") is False
        assert (await ledger.balance("acme")).balance_pico == 10 * 10**12

    async def test_unknown_one_is_not_found(self, ledger):
        with pytest.raises(NotFound):
            await ledger.balance("nobody")


class TestTransfers:
    async def test_deposit_books_once_per_id(self, ledger):
        await ledger.transfer(deposit("10"))
        assert (await ledger.balance("acme")).balance_pico == 10 * 10**12
        assert (await balances(ledger))[CASH].balance_pico == 10 * 10**12

    async def test_same_id_with_another_amount_conflicts(self, ledger):
        with pytest.raises(Conflict):
            await ledger.transfer(deposit("11"))

    async def test_unknown_account_is_refused(self, ledger):
        with pytest.raises(InvalidRequest):
            await ledger.transfer(deposit("1", "other", tenant="nobody"))

    async def test_amounts_beyond_64_bits_stay_exact(self, ledger):
        huge = deposit("1000000000000000", "huge")
        for n in range(3):
            await ledger.transfer(replace(huge, transfer_id=f"huge-{n}"))
        assert (await ledger.balance("acme")).balance_pico == 3 * 10**27 + 10**13


class TestHolds:
    async def test_is_granted_once_per_id(self, ledger):
        await ledger.register_producer("gw0")
        request = await held(ledger)
        again = await ledger.open_hold(request)
        assert again.status is HoldStatus.EXISTS
        assert (await ledger.balance("acme")).held_pico == 2 * CHARGE

    async def test_is_refused_to_a_fenced_producer(self, ledger):
        await ledger.register_producer("gw0")
        await ledger.register_producer("gw0")
        with pytest.raises(Conflict):
            await held(ledger, epoch=1)

    async def test_many_at_once_never_exceed_the_balance(self, ledger):
        await ledger.register_producer("gw0")
        each = {"wanted_pico": 3 * 10**12, "minimum_pico": 3 * 10**12}
        results = [await ledger.open_hold(hold_request(f"r{n}", **each)) for n in range(5)]
        assert [result.hold is not None for result in results] == [True] * 3 + [False] * 2
        assert (await ledger.balance("acme")).available_pico == 10**12


class TestAppend:
    async def test_draws_on_the_hold_and_moves_the_charge(self, ledger):
        await ledger.register_producer("gw0")
        request = await held(ledger)
        assert await ledger.append_records("gw0", 1, 0, [record(request)]) == 1
        accounts = await balances(ledger)
        tenant = accounts[tenant_account("acme")]
        assert (tenant.balance_pico, tenant.held_pico) == (10 * 10**12 - CHARGE, CHARGE)
        assert accounts[provider_account("local")].balance_pico == CHARGE
        (hold,) = await ledger.open_holds()
        assert (hold.amount_pico, hold.posted_pico) == (2 * CHARGE, CHARGE)

    async def test_charge_without_a_hold_is_refused(self, ledger):
        await ledger.register_producer("gw0")
        unpaid = record(await held(ledger), slice_id=None)
        with pytest.raises(InvalidRequest):
            await ledger.append_records("gw0", 1, 0, [unpaid])

    async def test_tokens_on_a_lease_need_no_hold(self, ledger):
        await ledger.register_producer("gw0")
        free = record(hold_request(lane=Lane.LEASE), slice_id=None, lease_id="lease-1")
        assert await ledger.append_records("gw0", 1, 0, [free]) == 1
        assert (await ledger.balance("acme")).balance_pico == 10 * 10**12

    async def test_same_batch_again_is_acknowledged_and_changes_nothing(self, ledger):
        await ledger.register_producer("gw0")
        batch = [record(await held(ledger))]
        for _ in range(3):
            assert await ledger.append_records("gw0", 1, 0, batch) == 1
        assert (await ledger.balance("acme")).balance_pico == 10 * 10**12 - CHARGE

    async def test_overlap_books_only_what_is_new(self, ledger):
        await ledger.register_producer("gw0")
        first = record(await held(ledger, "a"))
        second = record(await held(ledger, "b"))
        await ledger.append_records("gw0", 1, 0, [first])
        assert await ledger.append_records("gw0", 1, 0, [first, second]) == 2
        assert (await ledger.balance("acme")).balance_pico == 10 * 10**12 - 2 * CHARGE

    async def test_gap_is_refused(self, ledger):
        await ledger.register_producer("gw0")
        with pytest.raises(Conflict) as caught:
            await ledger.append_records("gw0", 1, 1, [record(await held(ledger))])
        assert caught.value.code == "sequence_gap"

    async def test_old_epoch_is_fenced(self, ledger):
        await ledger.register_producer("gw0")
        late = record(await held(ledger))
        await ledger.register_producer("gw0")
        with pytest.raises(Conflict) as caught:
            await ledger.append_records("gw0", 1, 0, [late])
        assert caught.value.code == "producer_fenced"
        assert (await ledger.balance("acme")).balance_pico == 10 * 10**12

    @pytest.mark.parametrize("change", [{"charge_pico": CHARGE - 1}, {"price_id": "price-0"}])
    async def test_charge_must_follow_from_a_known_price(self, ledger, change):
        await ledger.register_producer("gw0")
        wrong = msgspec.structs.replace(record(await held(ledger)), **change)
        with pytest.raises(InvalidRequest):
            await ledger.append_records("gw0", 1, 0, [wrong])
        assert (await ledger.balance("acme")).balance_pico == 10 * 10**12

    async def test_faults_are_recorded_and_free(self, ledger):
        await ledger.register_producer("gw0")
        free = record(await held(ledger), FinishReason.PROVIDER_ERROR)
        await ledger.append_records("gw0", 1, 0, [free])
        account = await ledger.balance("acme")
        assert (account.balance_pico, account.held_pico) == (10 * 10**12, 2 * CHARGE)


class TestSlices:
    """Token slices and a lease's hours: many records draw on one hold."""

    async def slice(self, ledger, amount=10 * CHARGE, epoch=1):
        request = hold_request("slice-1", epoch=epoch, wanted_pico=amount, minimum_pico=amount)
        await ledger.open_hold(request)
        return request

    def drawn(self, request, number):
        return record(request, request_id=f"req-gw0-{number}")

    async def test_each_record_takes_its_part_and_the_rest_stays_held(self, ledger):
        await ledger.register_producer("gw0")
        request = await self.slice(ledger)
        await ledger.append_records("gw0", 1, 0, [self.drawn(request, n) for n in range(3)])
        account = await ledger.balance("acme")
        assert (account.balance_pico, account.held_pico) == (10**13 - 3 * CHARGE, 7 * CHARGE)

    async def test_end_returns_the_rest_once(self, ledger):
        await ledger.register_producer("gw0")
        request = await self.slice(ledger)
        await ledger.append_records("gw0", 1, 0, [self.drawn(request, 1)])
        for _ in range(2):
            await ledger.end_hold("gw0", 1, "slice-1")
        account = await ledger.balance("acme")
        assert (account.balance_pico, account.held_pico) == (10**13 - CHARGE, 0)

    async def test_never_pays_more_than_it_holds(self, ledger):
        await ledger.register_producer("gw0")
        request = await self.slice(ledger, 2 * CHARGE)
        with pytest.raises(MarketError):
            await ledger.append_records("gw0", 1, 0, [self.drawn(request, n) for n in range(3)])
        assert (await ledger.balance("acme")).balance_pico == 10**13

    async def test_returns_when_its_producer_is_fenced(self, ledger):
        await ledger.register_producer("gw0")
        await self.slice(ledger)
        await ledger.register_producer("gw0")
        account = await ledger.balance("acme")
        assert (account.balance_pico, account.held_pico) == (10**13, 0)
        with pytest.raises(Conflict):
            await ledger.end_hold("gw0", 1, "slice-1")

    async def test_of_another_tenant_cannot_be_used(self, ledger):
        await ledger.register_producer("gw0")
        await ledger.create_tenant("bolt")
        request = await self.slice(ledger)
        stolen = msgspec.structs.replace(self.drawn(request, 1), tenant_id="bolt")
        with pytest.raises(InvalidRequest):
            await ledger.append_records("gw0", 1, 0, [stolen])

    async def test_unknown_one_cannot_be_ended(self, ledger):
        await ledger.register_producer("gw0")
        with pytest.raises(InvalidRequest):
            await ledger.end_hold("gw0", 1, "slice-9")

    async def change(self, ledger, version, wanted, minimum=0, epoch=1):
        change = HoldChange("slice-1", version, wanted, minimum)
        return await ledger.resize_hold("gw0", epoch, change)

    async def held(self, ledger):
        return (await ledger.balance("acme")).held_pico

    async def test_grows_and_shrinks_once_per_version(self, ledger):
        await ledger.register_producer("gw0")
        await self.slice(ledger, 2 * CHARGE)
        result = await self.change(ledger, 1, 5 * CHARGE)
        assert (result.status, result.hold.amount_pico) == (HoldStatus.GRANTED, 5 * CHARGE)
        await self.change(ledger, 3, 3 * CHARGE)
        late = await self.change(ledger, 2, 9 * CHARGE)
        assert (late.status, late.hold.amount_pico) == (HoldStatus.EXISTS, 3 * CHARGE)
        assert await self.held(ledger) == 3 * CHARGE

    async def test_never_shrinks_below_what_was_drawn(self, ledger):
        await ledger.register_producer("gw0")
        request = await self.slice(ledger, 5 * CHARGE)
        await ledger.append_records("gw0", 1, 0, [self.drawn(request, n) for n in range(3)])
        result = await self.change(ledger, 1, CHARGE)
        assert result.hold.amount_pico == 3 * CHARGE
        assert await self.held(ledger) == 0

    async def test_grows_as_far_as_the_money_goes_or_not_at_all(self, ledger):
        await ledger.register_producer("gw0")
        await self.slice(ledger, 10**12)
        part = await self.change(ledger, 1, 20 * 10**12, 5 * 10**12)
        assert part.hold.amount_pico == 10 * 10**12
        none = await self.change(ledger, 2, 20 * 10**12, 11 * 10**12)
        assert (none.status, none.hold) == (HoldStatus.EXCEEDS_UNTIL_OTHERS_END, None)
        assert await self.held(ledger) == 10 * 10**12

    async def test_that_has_ended_cannot_grow(self, ledger):
        await ledger.register_producer("gw0")
        await self.slice(ledger)
        await ledger.end_hold("gw0", 1, "slice-1")
        with pytest.raises(MarketError):
            await self.change(ledger, 1, CHARGE)

    async def test_of_a_fenced_or_other_producer_cannot_grow(self, ledger):
        await ledger.register_producer("gw0")
        await ledger.register_producer("gw1")
        await self.slice(ledger)
        with pytest.raises(InvalidRequest):
            await ledger.resize_hold("gw1", 1, HoldChange("slice-1", 1, 1, 0))
        await ledger.register_producer("gw0")
        with pytest.raises(Conflict):
            await self.change(ledger, 1, CHARGE)


class TestFencing:
    async def test_open_holds_of_the_old_epoch_return(self, ledger):
        assert await ledger.register_producer("gw0") == 1
        await held(ledger, "a")
        await held(ledger, "b")
        assert await ledger.register_producer("gw0") == 2
        account = await ledger.balance("acme")
        assert (account.balance_pico, account.held_pico) == (10 * 10**12, 0)

    async def test_holds_of_other_producers_stay(self, ledger):
        await ledger.register_producer("gw0")
        await ledger.register_producer("gw1")
        await held(ledger)
        await ledger.register_producer("gw1")
        (open_hold,) = await ledger.open_holds()
        assert open_hold.state is HoldState.PENDING
