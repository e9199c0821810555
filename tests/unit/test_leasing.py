from dataclasses import replace
from datetime import timedelta

import pytest

from market import leases as rules
from market import pricing
from market.accounts import provider_account
from market.errors import InsufficientBalance
from market.fakes import FakeClock, MemoryLedger
from market.leases import Event, Sight
from market.leasing import PRODUCER, Leasing
from market.types import CloseReason, Lane, LeaseState, RecordKind
from tests.samples import GPU_HOUR_PICO, NOON, OFFER, deposit, hold_request, lease

HOUR_S = 3_600
SECOND_PICO = GPU_HOUR_PICO // HOUR_S
NAME = "lease-1"


class Crash(Exception):
    """The process ended here."""


class MemoryShelf:
    """Leases in memory; segments wait in their order until they are sent."""

    def __init__(self, ledger, epoch):
        self.ledger = ledger
        self.epoch = epoch
        self.leases = {}
        self.outbox = []
        self.kept = 0
        self.broken = False
        self._next_seq = 0

    def unsent(self):
        return {lease_id for lease_id, _ in self.outbox}

    async def keep(self, lease, records):
        if self.broken:
            raise Crash
        self.leases[lease.lease_id] = lease
        self.outbox += [(lease.lease_id, record) for record in records]
        self.kept += 1

    async def send(self, forget=True):
        """``forget`` False: a crash between the ledger's answer and noting it."""
        records = [record for _, record in self.outbox]
        await self.ledger.append_records(PRODUCER, self.epoch, self._next_seq, records)
        if forget:
            self._next_seq += len(self.outbox)
            self.outbox.clear()


class Market:
    """One tenant with a balance, and what the scheduler's loop does for its leases."""

    def __init__(self):
        self.clock = FakeClock()
        self.ledger = MemoryLedger(self.clock)
        self.last = {}

    async def open(self, balance="100", ask_pico=GPU_HOUR_PICO):
        await self.ledger.create_tenant("acme")
        await self.ledger.create_provider("local")
        card = pricing.gpu_rate_card("server", ask_pico, OFFER.priced_at)
        await self.ledger.add_rate_cards([card], only_new_models=False)
        await self.ledger.transfer(deposit(balance))
        self.shelf = MemoryShelf(self.ledger, await self.ledger.register_producer(PRODUCER))
        self.leasing = Leasing(self.ledger, self.shelf)
        return self

    @property
    def lease(self):
        return self.shelf.leases[NAME]

    async def grant(self, own):
        await self.shelf.keep(await self.leasing.hold_first(own, self.clock.now()), ())

    def sight(self, run, name=NAME, lost=False):
        return Sight(run, self.last.get(name), lost)

    async def look(self, run, name=NAME, lost=False):
        """One round of the loop."""
        now = self.clock.now()
        await self.leasing.advance(name, now, self.sight(run, name, lost))
        if run is not None and self.shelf.leases[name].run_replica == run:
            self.last[name] = now
        await self.hold(name)

    async def hold(self, name=NAME):
        await self.shelf.send()
        await self.leasing.end_finished(name)
        await self.leasing.hold_ahead(name, self.clock.now())

    async def watch(self, seconds, run, every=10):
        for _ in range(0, seconds, every):
            self.clock.advance(every)
            await self.look(run)

    async def end(self, event, run=None):
        await self.leasing.close(NAME, event, self.clock.now(), self.sight(run), "why")
        await self.shelf.send()
        await self.leasing.end_finished(NAME)

    async def open_holds(self):
        return [hold.request.hold_id for hold in await self.ledger.open_holds()]

    async def available(self):
        return (await self.ledger.balance("acme")).available_pico

    async def earned(self):
        accounts = {a.account_id: a for a in await self.ledger.accounts()}
        return accounts[provider_account("local")].balance_pico

    def credits(self):
        rows = [dict(record.attrs) for record in self.ledger.records if record.attrs]
        return [(int(row["credited_us"]) / 10**6, row["credit_reason"]) for row in rows]


@pytest.fixture
async def market():
    return await Market().open()


class TestFirstHold:
    async def test_sets_an_hour_aside_and_stores_nothing(self, market):
        held = await market.leasing.hold_first(lease(), NOON)
        assert held.covered_until == NOON + timedelta(hours=1)
        assert await market.open_holds() == ["lease-1-hold-0"]
        assert await market.available() == 100 * pricing.PICO - GPU_HOUR_PICO
        assert market.shelf.leases == {}

    async def test_is_refused_with_what_it_takes(self):
        market = await Market().open("3.5")
        with pytest.raises(InsufficientBalance, match=r"balance of 3\.5 USD .*: 3\.6 USD") as error:
            await market.leasing.hold_first(lease(), NOON)
        assert error.value.metadata == {"needed": "3.6", "available": "3.5", "currency": "USD"}
        assert await market.open_holds() == []

    async def test_of_a_crash_before_the_lease_was_stored_ends_as_a_stranger(self, market):
        await market.leasing.hold_first(lease(), NOON)
        await market.ledger.register_producer("gw0")
        await market.ledger.open_hold(hold_request())
        await market.leasing.end_strangers()
        assert await market.open_holds() == ["slice-1"]

    async def test_of_a_known_lease_is_no_stranger(self, market):
        await market.grant(lease())
        await market.leasing.end_strangers()
        assert await market.open_holds() == ["lease-1-hold-0"]


class TestLife:
    async def test_from_the_first_hold_to_the_close(self, market):
        await market.grant(lease(term_s=9000))
        assert market.lease.state is LeaseState.PENDING
        await market.watch(100, None)
        await market.watch(10_000, "a")
        own = market.lease
        assert (own.state, own.close_reason) == (LeaseState.CLOSED, CloseReason.EXPIRED)
        assert own.activated_at == NOON + timedelta(seconds=110)
        assert (own.healthy_us, own.credited_us) == (8_890 * 10**6, 110 * 10**6)
        assert await market.earned() == own.charged_pico == 8_890 * SECOND_PICO
        assert await market.available() == 100 * pricing.PICO - own.charged_pico
        assert await market.open_holds() == []
        assert rules.is_over(own)
        assert market.credits() == [(110, "no healthy replica")]

    async def test_hours_are_held_ahead_and_given_back_once_metered(self, market):
        await market.grant(lease())
        await market.watch(2990, "a")
        assert await market.open_holds() == ["lease-1-hold-0"]
        await market.watch(10, "a")
        assert await market.open_holds() == ["lease-1-hold-0", "lease-1-hold-1"]
        await market.watch(590, "a")
        assert len(await market.open_holds()) == 2
        await market.watch(60, "a")
        assert await market.open_holds() == ["lease-1-hold-1"]

    async def test_it_serves_only_from_its_start_on(self, market):
        await market.grant(lease(start=NOON + timedelta(seconds=100)))
        await market.watch(90, "a")
        assert (market.lease.state, market.ledger.records) == (LeaseState.PENDING, [])
        await market.watch(10, "a")
        assert (market.lease.state, market.lease.reason) == (LeaseState.ACTIVE, "serving")

    async def test_the_end_is_announced_once(self, market):
        await market.grant(lease(term_s=7200))
        await market.watch(5390, "a")
        assert market.lease.noticed_at is None
        await market.watch(30, "a")
        assert market.lease.noticed_at == NOON + timedelta(seconds=5400)
        assert market.lease.reason == "ends at 2026-11-01 14:00:00 UTC unless it is renewed"

    async def test_a_look_that_tells_nothing_new_stores_nothing(self, market):
        await market.grant(lease())
        await market.watch(20, "a")
        kept = market.shelf.kept
        await market.watch(30, "a")
        assert market.shelf.kept == kept

    async def test_closing_or_advancing_a_closed_one_changes_nothing(self, market):
        await market.grant(lease())
        await market.watch(100, "a")
        await market.end(Event.RELEASE, "a")
        own, records = market.lease, len(market.ledger.records)
        market.clock.advance(50)
        await market.end(Event.FAIL)
        await market.look("a")
        assert (market.lease, len(market.ledger.records)) == (own, records)
        assert own.close_reason is CloseReason.RELEASED
        assert own.charged_pico == 90 * SECOND_PICO

    async def test_released_before_its_start_it_costs_nothing(self, market):
        await market.grant(lease(start=NOON + timedelta(days=1)))
        await market.end(Event.RELEASE)
        assert market.ledger.records == []
        assert await market.available() == 100 * pricing.PICO

    async def test_pause_charges_to_the_second_and_the_time_without_a_look_is_credited(
        self, market
    ):
        await market.grant(lease())
        await market.watch(100, "a")
        await market.leasing.pause(NAME, market.clock.now(), market.sight("a"))
        market.last.clear()
        market.clock.advance(900)
        await market.look("a")
        assert market.lease.charged_pico == 90 * SECOND_PICO
        assert market.credits() == [(10, "no healthy replica"), (900, "no healthy replica")]


class TestRecords:
    async def test_rows_of_the_usage_ledger(self, market):
        await market.grant(lease(gpu_count=2))
        await market.watch(100, "a")
        credited, charged = market.ledger.records
        assert charged.kind is RecordKind.GPU
        assert (charged.lane, charged.request_id) == (Lane.LEASE, None)
        assert (charged.lease_id, charged.deployment_id) == (NAME, NAME)
        assert charged.slice_id == "lease-1-hold-0"
        assert charged.finished_at - charged.started_at == timedelta(seconds=60)
        assert (charged.gpu_us, charged.gpu_milli) == (120_000_000, 2000)
        assert charged.charge_pico == 120 * SECOND_PICO
        assert (credited.charge_pico, credited.gpu_us) == (0, 0)
        assert credited.attrs == (
            ("credited_us", "10000000"),
            ("credit_reason", "no healthy replica"),
        )

    async def test_segments_sent_twice_are_booked_once(self, market):
        await market.grant(lease())
        market.clock.advance(1)
        await market.look("a")
        market.clock.advance(1000)
        await market.leasing.advance(NAME, market.clock.now(), market.sight("a"))
        await market.shelf.send(forget=False)
        await market.shelf.send()
        assert await market.earned() == market.lease.charged_pico == 960 * SECOND_PICO

    async def test_hold_stays_open_while_segments_are_on_their_way(self, market):
        await market.grant(lease())
        await market.watch(100, "a")
        await market.leasing.close(
            NAME, Event.RELEASE, market.clock.now(), market.sight("a"), "why"
        )
        await market.leasing.end_finished(NAME)
        assert await market.open_holds() == ["lease-1-hold-0"]
        await market.shelf.send()
        await market.leasing.end_finished(NAME)
        assert await market.open_holds() == []


class TestOutOfFunds:
    @pytest.fixture
    async def market(self):
        """Money for an hour and 90 seconds, seen healthy for 59 minutes."""
        market = await Market().open("3.69")
        await market.grant(lease())
        await market.look("a")
        await market.watch(3540, "a")
        return market

    async def test_the_next_hour_is_held_for_as_long_as_the_money_lasts(self, market):
        assert market.lease.covered_until == NOON + timedelta(seconds=3690)
        assert await market.available() == 0

    async def test_it_says_until_when_it_is_paid_and_what_to_deposit(self, market):
        await market.watch(120, "a")
        assert market.lease.reason == (
            "paid until 13:01:30 UTC; it closes at 13:06:30 unless at least 0.06 USD is deposited"
        )

    async def test_it_closes_after_the_grace_which_is_not_charged(self, market):
        await market.watch(440, "a")
        assert market.lease.state is LeaseState.ACTIVE
        await market.watch(10, "a")
        own = market.lease
        assert (own.close_reason, own.end) == (
            CloseReason.OUT_OF_FUNDS,
            NOON + timedelta(seconds=3990),
        )
        assert await market.earned() == own.charged_pico == 3690 * SECOND_PICO
        assert market.credits() == [(300, "the balance was out: not charged")]
        assert await market.open_holds() == []

    async def test_deposit_within_the_grace_pays_that_too(self, market):
        await market.watch(430, "a")
        await market.ledger.transfer(deposit("50", "deposit-2"))
        await market.watch(3010, "a")
        own = market.lease
        assert (own.state, own.reason) == (LeaseState.ACTIVE, "serving")
        assert market.credits() == []
        await market.end(Event.RELEASE, "a")
        assert await market.earned() == 6980 * SECOND_PICO

    async def test_it_closes_then_also_if_nothing_has_been_healthy_since_before(self, market):
        await market.watch(460, None)
        assert market.lease.close_reason is CloseReason.OUT_OF_FUNDS

    async def test_deposit_helps_also_if_nothing_has_been_healthy_since_before(self, market):
        await market.watch(120, None)
        await market.ledger.transfer(deposit("50", "deposit-2"))
        await market.watch(600, None)
        assert market.lease.state is LeaseState.ACTIVE

    async def test_what_is_said_of_one_that_never_served(self):
        market = await Market().open("3.6")
        await market.grant(lease())
        await market.watch(3610, None)
        assert market.lease.reason.startswith("paid until 13:00:00 UTC")
        await market.ledger.transfer(deposit("50", "deposit-2"))
        await market.watch(10, None)
        assert market.lease.state is LeaseState.PENDING
        assert market.lease.reason != "serving"


class TestCrash:
    async def crash_in_hold(self, market, seconds):
        """The ledger has opened the next hold, but that was never stored."""
        market.shelf.broken = True
        market.clock.advance(seconds)
        with pytest.raises(Crash):
            await market.hold()
        market.shelf.broken = False

    @pytest.mark.parametrize("away_s", [1200, 5000])
    async def test_one_with_money_outlives_a_long_absence_of_the_scheduler(self, market, away_s):
        await market.grant(lease())
        await market.watch(2900, "a")
        market.last.clear()
        market.clock.advance(away_s)
        await market.look("a")
        assert market.lease.state is LeaseState.ACTIVE

    async def test_hold_that_was_opened_but_not_stored_is_found_again(self, market):
        await market.grant(lease())
        await market.watch(2990, "a")
        await self.crash_in_hold(market, 10)
        before = await market.available()
        await market.leasing.end_strangers()
        await market.watch(100, "a")
        assert await market.available() == before
        assert market.lease.covered_until == NOON + timedelta(hours=2)

    @pytest.mark.parametrize("later_s", [0, 700])
    async def test_partly_granted_one_covers_the_same_when_found_later(self, later_s):
        market = await Market().open("5")
        await market.grant(lease())
        await self.crash_in_hold(market, 3000)
        market.clock.advance(later_s)
        await market.hold()
        assert market.lease.covered_until == NOON + timedelta(seconds=5000)

    @pytest.mark.parametrize("restart", ["before the close", "after it"])
    async def test_hold_that_was_opened_but_not_stored_ends_with_its_lease(self, market, restart):
        await market.grant(lease())
        await market.watch(2990, "a")
        await self.crash_in_hold(market, 10)
        if restart == "before the close":
            await market.leasing.end_strangers()
        await market.end(Event.RELEASE, "a")
        if restart == "after it":
            await market.leasing.end_strangers()
        assert rules.is_over(market.lease)
        assert await market.open_holds() == []

    async def test_leases_of_one_tenant_do_not_touch_each_other(self, market):
        await market.grant(lease())
        await market.grant(replace(lease(), lease_id="lease-2"))
        await market.watch(100, "a")
        await market.look("b", "lease-2")
        await market.end(Event.RELEASE, "a")
        assert await market.open_holds() == ["lease-2-hold-0"]
        assert {record.lease_id for record in market.ledger.records} == {NAME, "lease-2"}
