"""Keys, budgets and token packs on both databases."""

import contextlib
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest

from market import pricing
from market.accounts import HoldStatus, TransferKind, pack_account, tenant_account
from market.errors import Conflict, InsufficientBalance, InvalidRequest, NotFound
from market.fakes import FakeClock
from market.ledger.refunds import Refund
from market.ledger.schema import encode_batch
from market.ledger.service import Ledger
from market.ledger.statement import Party
from market.pricing import charge, to_decimal
from market.types import (
    Budget,
    FinishReason,
    HoldChange,
    KeyPolicy,
    Lane,
    Pack,
    Period,
    Principal,
    Role,
    TokenCounts,
)
from tests.contracts.test_ledger import CHARGE, record
from tests.contracts.test_whole_ledger import config
from tests.samples import ACME, CARD, NOON, deposit, hold_request, token_record

__all__ = ["config"]

DAY = timedelta(days=1)
BUDGETED = replace(ACME, api_key_id="key-budget")


@pytest.fixture
def clock():
    return FakeClock()


@contextlib.asynccontextmanager
async def opened(config, clock):
    ledger = Ledger(config, clock, on_fatal=lambda: None)
    await ledger.open()
    try:
        yield ledger
    finally:
        await ledger.close()


async def fill(ledger):
    """A tenant with 10, a provider, a price."""
    await ledger.create_tenant("acme")
    await ledger.create_provider("local")
    await ledger.add_rate_cards([CARD], only_new_models=False)
    await ledger.transfer(deposit("10"))


@pytest.fixture
async def ledger(config, clock):
    async with opened(config, clock) as ledger:
        await fill(ledger)
        await ledger.add_key(ACME, "hash-1")
        await ledger.add_key(BUDGETED, "hash-2")
        await ledger.register_producer("gw0")
        yield ledger


def asking(hold_id, wanted, minimum=None, **more):
    minimum = wanted if minimum is None else minimum
    return hold_request(hold_id, wanted_pico=wanted, minimum_pico=minimum, **more)


async def spend(ledger, hold, first_seq, count=1, price=CARD):
    """Records of one sample request each."""
    counts = TokenCounts(100, 40, 10)
    cost = charge(counts, price, FinishReason.STOP, Lane.TOKENS)
    records = [
        token_record(
            hold,
            request_id=f"req-{first_seq + n}",
            counts=counts,
            charge_pico=cost,
            price_id=price.price_id,
            finish_reason=FinishReason.STOP,
            api_key_id=hold.api_key_id or "key-acme",
        )
        for n in range(count)
    ]
    await ledger.append("gw0", 1, first_seq, encode_batch(records))
    return cost * count


class TestKeys:
    async def test_speak_for_their_subject_with_their_policy(self, ledger):
        policy = KeyPolicy(models=("tiny",), lanes=(Lane.TOKENS,), requests_per_min=5)
        await ledger.set_policy("key-acme", policy)
        await ledger.set_weight("acme", 3)
        found = await ledger.find_key("hash-1")
        assert (found.subject_id, found.policy, found.weight) == ("acme", policy, 3)
        assert not found.budgeted
        await ledger.set_budgets("key-acme", {Period.DAY: 1})
        assert (await ledger.find_key("hash-1")).budgeted

    async def test_rotated_ones_have_two_secrets_for_a_while(self, ledger, clock):
        until = await ledger.rotate_key("key-acme", "hash-new", timedelta(hours=1))
        assert until == clock.now() + timedelta(hours=1)
        for secret in ("hash-1", "hash-new"):
            assert (await ledger.find_key(secret)).api_key_id == "key-acme"
        clock.advance(3600)
        assert await ledger.find_key("hash-1") is None
        assert await ledger.find_key("hash-new") is not None

    async def test_revoked_ones_speak_for_nobody_and_cannot_be_rotated(self, ledger):
        await ledger.rotate_key("key-acme", "hash-new", DAY)
        await ledger.revoke_key("key-acme")
        for secret in ("hash-1", "hash-new"):
            assert await ledger.find_key(secret) is None
        with pytest.raises(Conflict):
            await ledger.rotate_key("key-acme", "hash-newer", DAY)

    async def test_every_change_is_news_to_gateways(self, ledger, config, clock):
        seen = [(await ledger.access()).version]
        for change in (
            ledger.add_key(replace(ACME, api_key_id="key-x"), "hash-x"),
            ledger.set_policy("key-x", KeyPolicy(read_only=True)),
            ledger.rotate_key("key-x", "hash-y", DAY),
            ledger.revoke_key("key-x"),
            ledger.set_weight("acme", 2),
            ledger.set_budgets("key-acme", {Period.DAY: 5}),
        ):
            await change
            seen.append((await ledger.access()).version)
        assert len(set(seen)) == len(seen)

    async def test_unknown_ones_are_not_found(self, ledger):
        for action in (
            ledger.key("key-?"),
            ledger.set_policy("key-?", KeyPolicy()),
            ledger.rotate_key("key-?", "h", DAY),
            ledger.revoke_key("key-?"),
            ledger.set_budgets("key-?", {Period.DAY: 5}),
        ):
            with pytest.raises(NotFound):
                await action

    async def test_only_for_subjects_that_are_there(self, ledger):
        for role in (Role.TENANT, Role.PROVIDER):
            with pytest.raises(NotFound):
                await ledger.add_key(Principal("key-y", role, "nobody"), "hash-y")


class TestBudgets:
    async def test_bound_what_is_held_over_all_slices_of_the_key(self, ledger):
        await ledger.set_budgets("key-budget", {Period.DAY: 1000})
        first = await ledger.open_hold(asking("s1", 700, api_key_id="key-budget"))
        assert first.hold.amount_pico == 700
        second = await ledger.open_hold(asking("s2", 700, 100, api_key_id="key-budget"))
        assert second.hold.amount_pico == 300
        third = await ledger.open_hold(asking("s3", 100, 1, api_key_id="key-budget"))
        assert third.hold is None
        assert third.status is HoldStatus.EXCEEDS_UNTIL_OTHERS_END
        grown = await ledger.resize_hold("gw0", 1, HoldChange("s1", 1, 800, 750))
        assert grown.hold is None
        shrunk = await ledger.resize_hold("gw0", 1, HoldChange("s1", 2, 500, 500))
        assert shrunk.hold.amount_pico == 500
        assert (await ledger.open_hold(asking("s4", 200, api_key_id="key-budget"))).hold is not None

    async def test_other_keys_are_free_of_it(self, ledger):
        await ledger.set_budgets("key-budget", {Period.DAY: 1})
        assert (await ledger.open_hold(asking("s1", 10**12))).hold is not None

    async def test_of_a_tenant_bound_all_its_keys(self, ledger):
        await ledger.set_budgets(tenant_account("acme"), {Period.HOUR: 1000})
        assert (await ledger.open_hold(asking("s1", 600))).hold is not None
        refused = await ledger.open_hold(asking("s2", 600, api_key_id="key-budget"))
        assert refused.hold is None
        assert refused.available_pico == 400

    async def test_spent_ones_say_when_they_begin_anew(self, ledger, clock):
        await ledger.set_budgets("key-budget", {Period.DAY: CHARGE})
        hold = asking("s1", CHARGE, api_key_id="key-budget")
        await ledger.open_hold(hold)
        await spend(ledger, hold, 0)
        await ledger.end_hold("gw0", 1, "s1")
        refused = await ledger.open_hold(asking("s2", CHARGE, api_key_id="key-budget"))
        assert refused.status is HoldStatus.EXCEEDS_BUDGET
        assert (refused.available_pico, refused.allowance.period) == (0, Period.DAY)
        assert refused.allowance.resets_at == NOON.replace(hour=0) + DAY
        (row,) = await ledger.budget_rows("key-budget")
        assert row["spent"] == row["limit"] == pricing.format_money(CHARGE)
        clock.advance(DAY.total_seconds())
        again = await ledger.open_hold(asking("s3", CHARGE, api_key_id="key-budget"))
        assert again.hold is not None
        (row,) = await ledger.budget_rows("key-budget")
        assert row["spent"] == "0"

    async def test_the_tightest_counts_and_the_total_never_resets(self, ledger, clock):
        await ledger.set_budgets("key-budget", {Period.DAY: 2 * CHARGE, Period.TOTAL: 3 * CHARGE})
        for day in range(2):
            hold = asking(f"s{day}", 2 * CHARGE, 1, api_key_id="key-budget")
            granted = (await ledger.open_hold(hold)).hold.amount_pico
            assert granted == (2 * CHARGE, CHARGE)[day]
            await spend(ledger, hold, 2 * day, granted // CHARGE)
            await ledger.end_hold("gw0", 1, hold.hold_id)
            clock.advance(DAY.total_seconds())
        refused = await ledger.open_hold(asking("s9", CHARGE, 1, api_key_id="key-budget"))
        assert (refused.allowance.period, refused.allowance.resets_at) == (Period.TOTAL, None)

    async def test_set_late_they_count_what_was_spent_before(self, ledger, clock):
        hold = asking("s1", 3 * CHARGE, api_key_id="key-budget")
        await ledger.open_hold(hold)
        await spend(ledger, hold, 0)
        await ledger.publish()
        await spend(ledger, hold, 1)  # booked, not in the files yet
        await ledger.set_budgets("key-budget", {Period.DAY: 10**12})
        (row,) = await ledger.budget_rows("key-budget")
        assert row["spent"] == pricing.format_money(2 * CHARGE)
        await spend(ledger, hold, 2)
        (row,) = await ledger.budget_rows("key-budget")
        assert row["spent"] == pricing.format_money(3 * CHARGE)

    async def test_are_removed_and_survive_a_restart(self, ledger, config, clock):
        await ledger.set_budgets("key-budget", {Period.DAY: 500, Period.HOUR: 400})
        hold = asking("s1", 300, api_key_id="key-budget")
        await ledger.open_hold(hold)
        await ledger.set_budgets("key-budget", {Period.HOUR: None})
        rows = await ledger.budget_rows("key-budget")
        assert [row["period"] for row in rows] == ["day"]
        await ledger.close()
        async with opened(config, clock) as again:
            refused = await again.open_hold(asking("s2", 300, api_key_id="key-budget"))
            assert refused.available_pico == 200


def pack(pack_id="p1", tokens=1000, price=None, **changes):
    price = price or pricing.make_rate_card(
        f"pack:{pack_id}", (50_000, 25_000, 200_000), NOON, "USD"
    )
    values = {
        "pack_id": pack_id,
        "tenant_id": "acme",
        "model": "tiny",
        "price_id": price.price_id,
        "tokens": tokens,
        "currency": "USD",
        "bought_at": NOON,
        "expires_at": NOON + 30 * DAY,
    }
    return Pack(**(values | changes)), price


async def account(ledger, account_id):
    return next(a for a in await ledger.accounts() if a.account_id == account_id)


class TestPacks:
    async def test_move_their_price_once(self, ledger):
        wanted, price = pack()
        bought, created = await ledger.buy_tokens(wanted, price, "key-op")
        assert (bought, created) == (wanted, True)
        assert await ledger.buy_tokens(wanted, price, "key-op") == (wanted, False)
        cost = 1000 * price.output_pico
        assert (await ledger.balance("acme")).balance_pico == 10 * 10**12 - cost
        assert (await account(ledger, pack_account("acme", "p1"))).balance_pico == cost
        with pytest.raises(Conflict):
            await ledger.buy_tokens(replace(wanted, tokens=7), price, "key-op")

    async def test_too_dear_ones_change_nothing(self, ledger):
        with pytest.raises(InsufficientBalance, match="available is 10"):
            await ledger.buy_tokens(*pack(tokens=10**9), "key-op")
        assert await ledger.packs("acme") == []
        assert (await ledger.balance("acme")).balance_pico == 10 * 10**12

    async def test_of_nobody_are_not_sold(self, ledger):
        with pytest.raises(NotFound):
            await ledger.buy_tokens(*pack(tenant_id="nobody"), "key-op")

    async def test_pay_for_records_at_their_own_price(self, ledger):
        wanted, price = pack()
        await ledger.buy_tokens(wanted, price, "key-op")
        balance = (await ledger.balance("acme")).balance_pico
        hold = asking("s1", 10**8, pack_id="p1")
        assert (await ledger.open_hold(hold)).hold.amount_pico == 10**8
        cost = await spend(ledger, hold, 0, 2, price)
        assert cost == 2 * (60 * 50_000 + 40 * 25_000 + 10 * 200_000)
        await ledger.end_hold("gw0", 1, "s1")
        left = await account(ledger, pack_account("acme", "p1"))
        assert left.available_pico == 1000 * price.output_pico - cost
        assert (await ledger.balance("acme")).balance_pico == balance
        await ledger.publish()
        assert (await ledger.verify())["finding"] is None

    async def test_are_offered_first_to_expire_first_and_for_their_model_only(self, ledger):
        await ledger.buy_tokens(*pack("late"), "key-op")
        await ledger.buy_tokens(*pack("soon", expires_at=NOON + DAY), "key-op")
        await ledger.buy_tokens(*pack("other", model="large"), "key-op")
        result = await ledger.open_hold(asking("s1", 5))
        assert [offer.pack.pack_id for offer in result.packs] == ["soon", "late"]

    async def test_expire_and_what_is_left_is_the_markets(self, ledger, clock, config):
        wanted, price = pack()
        await ledger.buy_tokens(wanted, price, "key-op")
        hold = asking("s1", 10**8, pack_id="p1")
        await ledger.open_hold(hold)
        await spend(ledger, hold, 0, 1, price)
        clock.advance(31 * DAY.total_seconds())
        assert (await ledger.open_hold(asking("s2", 5, pack_id="p1"))).hold is None
        await ledger.keep_house()
        assert (await account(ledger, pack_account("acme", "p1"))).balance_pico > 0  # still held
        await ledger.end_hold("gw0", 1, "s1")
        await ledger.keep_house()
        assert (await account(ledger, pack_account("acme", "p1"))).balance_pico == 0
        assert await ledger.packs("acme") == []
        await ledger.publish()
        assert (await ledger.verify())["finding"] is None
        await ledger.close()
        async with opened(config, clock) as again:
            await again.keep_house()
            assert await again.packs("acme") == []

    async def test_are_money_of_the_tenant_in_its_statement(self, ledger, clock):
        wanted, price = pack()
        await ledger.buy_tokens(wanted, price, "key-op")
        hold = asking("s1", 10**8, pack_id="p1")
        await ledger.open_hold(hold)
        cost = await spend(ledger, hold, 0, 1, price)
        await ledger.end_hold("gw0", 1, "s1")
        await ledger.publish()
        statement = await ledger.statement(Party.TENANT, "acme", "2026-11")
        moved = {movement.kind: movement.amount for movement in statement.movements}
        assert moved == {"deposit": to_decimal(10 * 10**12), "charge": -to_decimal(cost)}
        assert statement.closing == to_decimal(10 * 10**12 - cost)
        clock.advance(40 * DAY.total_seconds())
        await ledger.keep_house()
        await ledger.publish()
        december = await ledger.statement(Party.TENANT, "acme", "2026-12")
        moved = {movement.kind: movement.amount for movement in december.movements}
        assert moved == {TransferKind.EXPIRE: -to_decimal(1000 * price.output_pico - cost)}
        assert december.closing == to_decimal((await ledger.balance("acme")).balance_pico)

    async def test_what_they_paid_for_is_refunded_to_the_balance(self, ledger):
        wanted, price = pack()
        await ledger.buy_tokens(wanted, price, "key-op")
        hold = asking("s1", 10**8, pack_id="p1")
        await ledger.open_hold(hold)
        cost = await spend(ledger, hold, 0, 1, price)
        await ledger.publish()
        before = (await ledger.balance("acme")).balance_pico
        await ledger.refund(Refund("r1", "acme", "bad", "key-op", "req-0"))
        assert (await ledger.balance("acme")).balance_pico == before + cost
        await ledger.publish()
        assert (await ledger.verify())["finding"] is None

    async def test_cannot_be_drawn_on_by_others(self, ledger):
        await ledger.create_tenant("globex")
        await ledger.buy_tokens(*pack(), "key-op")
        stranger = asking("s1", 5, tenant_id="globex", pack_id="p1")
        assert (await ledger.open_hold(stranger)).hold is None


async def test_a_slice_pays_for_its_own_tenant_only(ledger):
    await ledger.create_tenant("globex")
    hold = asking("s1", 10**8)
    await ledger.open_hold(hold)
    stolen = record(replace(hold, tenant_id="globex"), request_id="req-0")
    with pytest.raises(InvalidRequest):
        await ledger.append("gw0", 1, 0, encode_batch([stolen]))


class TestCaps:
    """What spills from a lease has a budget of its own, which holds carry with them."""

    SPILLED = Budget("spill:lease-1", Period.DAY, 3 * CHARGE)

    async def test_holds_stop_at_the_cap_and_money_returned_counts_no_more(self, ledger):
        epoch = await ledger.register_producer("gw0")
        ask = partial(hold_request, epoch=epoch, cap=self.SPILLED, lane=Lane.SPILL)
        first = await ledger.open_hold(ask("a", wanted_pico=2 * CHARGE, minimum_pico=CHARGE))
        assert first.status is HoldStatus.GRANTED
        second = await ledger.open_hold(ask("b", wanted_pico=2 * CHARGE, minimum_pico=1))
        assert second.hold.amount_pico == CHARGE
        third = await ledger.open_hold(ask("c", wanted_pico=1, minimum_pico=1))
        assert third.status is HoldStatus.EXCEEDS_UNTIL_OTHERS_END
        await ledger.end_hold("gw0", epoch, "a")
        again = await ledger.open_hold(ask("d", wanted_pico=2 * CHARGE, minimum_pico=1))
        assert again.hold.amount_pico == 2 * CHARGE
        other = await ledger.open_hold(hold_request("e", epoch=epoch, wanted_pico=CHARGE))
        assert other.status is HoldStatus.GRANTED

    async def test_limit_that_is_set_later_counts_what_was_spent_without_one(self, ledger):
        epoch = await ledger.register_producer("gw0")
        free = replace(self.SPILLED, limit_pico=10**27)
        hold = hold_request("a", epoch=epoch, cap=free, lane=Lane.SPILL, wanted_pico=2 * CHARGE)
        await ledger.open_hold(hold)
        rows = [record(hold, request_id="r1"), record(hold, request_id="r2")]
        await ledger.append("gw0", epoch, 0, encode_batch(rows))
        await ledger.end_hold("gw0", epoch, "a")
        asked = hold_request("b", epoch=epoch, cap=self.SPILLED, lane=Lane.SPILL, minimum_pico=1)
        granted = await ledger.open_hold(replace(asked, wanted_pico=9 * CHARGE))
        assert granted.hold.amount_pico == CHARGE

    async def test_what_was_spent_counts_over_restarts_until_the_day_is_over(self, config, clock):
        async with opened(config, clock) as ledger:
            await fill(ledger)
            epoch = await ledger.register_producer("gw0")
            ask = partial(hold_request, epoch=epoch, cap=self.SPILLED, lane=Lane.SPILL)
            hold = ask("a", wanted_pico=2 * CHARGE, minimum_pico=1)
            await ledger.open_hold(hold)
            rows = [record(hold, request_id="r1"), record(hold, request_id="r2")]
            await ledger.append("gw0", epoch, 0, encode_batch(rows))
            await ledger.end_hold("gw0", epoch, "a")
        async with opened(config, clock) as ledger:
            wanted = ask("b", wanted_pico=9 * CHARGE, minimum_pico=1)
            assert (await ledger.open_hold(wanted)).hold.amount_pico == CHARGE
            await ledger.end_hold("gw0", epoch, "b")
            asked = ask("c", wanted_pico=9 * CHARGE, minimum_pico=2 * CHARGE)
            refused = await ledger.open_hold(asked)
            assert refused.status is HoldStatus.EXCEEDS_BUDGET
            assert refused.allowance.subject == self.SPILLED.subject
            assert refused.allowance.resets_at == NOON.replace(hour=0) + DAY
            clock.advance(DAY.total_seconds())
            assert (await ledger.open_hold(asked)).hold.amount_pico == 3 * CHARGE


async def test_forecasts_read_what_pools_were_asked_by_ten_minutes(ledger):
    """Neither what ran on a lease, nor what is too old."""
    hold = hold_request("a", wanted_pico=9 * CHARGE)
    await ledger.open_hold(hold)
    spill = replace(hold, hold_id="b", lane=Lane.SPILL)
    await ledger.open_hold(spill)
    lease = replace(hold, lane=Lane.LEASE)
    later, old = NOON + timedelta(minutes=10), NOON - DAY
    rows = [
        record(hold, request_id="r1", duration_ms=1500),
        record(spill, request_id="r2", duration_ms=500),
        record(hold, request_id="r3", started_at=later, duration_ms=None),
        record(hold, request_id="r4", started_at=old),
        record(lease, request_id="r5", slice_id=None),
    ]
    await ledger.append("gw0", 1, 0, encode_batch(rows))
    first = int(NOON.timestamp()) // 600
    assert await ledger.arrivals(NOON) == [
        (hold.model, first, 2, 2.0),
        (hold.model, first + 1, 1, 0.0),
    ]
