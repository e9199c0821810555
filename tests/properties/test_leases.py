"""Random looks, restarts, deposits, renewals and kills: what is charged is exact and was seen."""

from bisect import bisect_left, bisect_right
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from operator import itemgetter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from market import leases as rules
from market import pricing
from market.accounts import HoldState
from market.errors import Conflict, InsufficientBalance
from market.leases import Event
from market.leasing import Leasing
from market.types import CloseReason, LeaseState
from tests.samples import GPU_HOUR_PICO, NOON, OFFER, deposit, lease
from tests.unit.test_leasing import Crash, Market, MemoryShelf

HOUR_GPU_US = 3_600 * 10**6
NAMES = ("lease-1", "lease-2")
RUNS = ("a", "b", None)
SAME = "same"
ENDS = (Event.RELEASE, Event.LOSE_NODE, Event.LEAVE, Event.FAIL)
prices = st.sampled_from([0, 1, 2_123_456_789_012, GPU_HOUR_PICO])
shapes = st.sampled_from([(1, 1), (1, 333), (1, 999), (1, 1000), (2, 1000), (3, 1000)])
terms = st.sampled_from([30_000, 9_000, 3_601, 600, 59])
starts = st.sampled_from([0, 0, 45.5, 4_000])
hours = st.sampled_from([0.001, 0.02, 0.1, 1.02, 50])
changes = st.sampled_from([SAME, SAME, SAME, *RUNS])
steps = st.sampled_from([0.5, 30, 59.999999, 60, 61, 240, 600, 3_000, 4_000]) | st.integers(
    1, 600 * 10**6
).map(lambda time_us: time_us / 10**6)


def done(coroutine):
    """The result of a coroutine that waits for nothing: a fresh event loop each is slow."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits for something")


class Witness(MemoryShelf):
    """Looks at all that is stored of a lease, when it is stored."""

    def __init__(self, ledger, epoch):
        super().__init__(ledger, epoch)
        self.looks = {name: [] for name in NAMES}
        self.until = {}
        self.spans = {}
        self.drawn_pico = {}
        self.charged_us = dict.fromkeys(NAMES, 0)

    async def keep(self, lease, records):
        await super().keep(lease, records)
        if lease.hold_index >= 0:
            span = (lease.hold_from, lease.covered_until)
            self.spans.setdefault(lease.hold_id(lease.hold_index), span)
        self.until.setdefault(lease.lease_id, lease.start)
        for record in records:
            self.see(lease, record)
        assert self.until[lease.lease_id] == lease.metered_until
        self.check(lease)

    def see(self, lease, record):
        """No gap, no overlap; charged only if a run was seen and its money was held."""
        name, start, end = lease.lease_id, record.started_at, record.finished_at
        assert start == self.until[name] < end <= lease.end
        self.until[name] = end
        length_us = (end - start) // rules.MICRO
        if record.attrs:
            credited = dict(record.attrs)
            assert credited["credited_us"] == str(length_us)
            assert credited["credit_reason"]
            assert record.charge_pico == record.gpu_us == 0
            assert end - start <= rules.CREDIT_SEGMENT
            return
        held_from, covered_until = self.spans[record.slice_id]
        assert held_from <= start
        assert end <= covered_until
        assert end - start <= rules.SEGMENT
        assert self.was_healthy(name, start, end)
        self.charged_us[name] += length_us
        drawn_pico = self.drawn_pico.get(record.slice_id, 0) + record.charge_pico
        self.drawn_pico[record.slice_id] = drawn_pico
        assert drawn_pico <= self.ledger._books.holds[record.slice_id].amount_pico

    def was_healthy(self, name, start, end):
        """Whether one run was seen at both ends of a time, and no other in between."""
        looks = self.looks[name]
        first = bisect_right(looks, start, key=itemgetter(0)) - 1
        last = bisect_left(looks, end, key=itemgetter(0))
        runs = {run for _, run in looks[max(0, first) : last + 1]}
        return first >= 0 and last < len(looks) and len(runs) == 1 and None not in runs

    def check(self, lease):
        """The lease's own sums follow from its segments, to the last digit."""
        holds = [f"{lease.lease_id}-hold-{index}" for index in range(lease.hold_index + 1)]
        charged_pico = sum(self.drawn_pico.get(hold_id, 0) for hold_id in holds)
        assert lease.healthy_us == self.charged_us[lease.lease_id]
        assert lease.gpu_us == lease.healthy_us * lease.total_milli // 1000
        exact_pico = lease.gpu_us * lease.gpu_hour_pico // HOUR_GPU_US
        assert lease.charged_pico == charged_pico == exact_pico
        decided = lease.metered_until - lease.start
        assert lease.healthy_us + lease.credited_us == decided // rules.MICRO
        if lease.state is not LeaseState.CLOSED:
            assert 1 <= lease.hold_index - lease.ended_index <= 2


class LeaseMachine(RuleBasedStateMachine):
    @initialize(
        price_pico=prices,
        shape=st.tuples(shapes, shapes),
        term_s=st.tuples(terms, terms),
        start_s=st.tuples(starts, starts),
        balance=hours,
    )
    def order(self, price_pico, shape, term_s, start_s, balance):
        self.market = Market()
        self.hour_pico = price_pico * shape[0][0] * shape[0][1] // 1000
        self.deposited_pico = self.amount_pico(1 + balance)
        done(self.market.open(pricing.format_money(self.deposited_pico), price_pico))
        ledger = self.market.ledger
        self.shelf = Witness(ledger, self.market.shelf.epoch)
        self.market.shelf = self.shelf
        self.restart()
        self.runs = dict.fromkeys(NAMES)
        card = pricing.gpu_rate_card("server", price_pico, OFFER.priced_at)
        for name, (count, milli), seconds, ahead_s in zip(
            NAMES, shape, term_s, start_s, strict=True
        ):
            own = replace(
                lease(NOON + timedelta(seconds=ahead_s), seconds, lease_id=name),
                gpu_count=count,
                gpu_milli=milli,
                gpu_hour_pico=price_pico,
                price_id=card.price_id,
            )
            try:
                done(self.market.grant(own))
            except InsufficientBalance:
                assert done(self.market.available()) < price_pico * own.total_milli // 1000 + 1

    def amount_pico(self, number):
        return 1 + int(self.hour_pico * number)

    def sight(self, name, lost=False):
        run = None if lost else self.runs[name]
        self.shelf.looks[name].append((self.market.clock.now(), run))
        return run

    def look(self, name, lost=False):
        done(self.market.look(self.sight(name, lost), name, lost))

    @rule(seconds=steps, runs=st.tuples(changes, changes), lost=st.booleans())
    def wait(self, seconds, runs, lost):
        """One round after a while in which replicas may start, die or be replaced."""
        self.market.clock.advance(seconds)
        for name, run in zip(NAMES, runs, strict=True):
            self.runs[name] = self.runs[name] if run is SAME else run
            if name in self.shelf.leases:
                self.look(name, lost and self.runs[name] is None)

    @rule(count=st.integers(10, 60), every=st.sampled_from([7, 20, 61, 90]), run=changes)
    def watch(self, count, every, run):
        for _ in range(count):
            self.wait(every, (run, SAME), False)

    @rule(seconds=steps)
    def wait_without_ledger(self, seconds):
        """Nothing can be sent or held."""
        self.market.clock.advance(seconds)
        for name in self.shelf.leases:
            now = self.market.clock.now()
            run = self.sight(name)
            done(self.market.leasing.advance(name, now, self.market.sight(run, name)))
            if run is not None and self.shelf.leases[name].run_replica == run:
                self.market.last[name] = now

    @rule()
    def restart(self):
        """All that only memory knew is lost."""
        self.market.last.clear()
        self.market.leasing = Leasing(self.market.ledger, self.shelf)
        done(self.market.leasing.end_strangers())

    @rule(name=st.sampled_from(NAMES))
    def crash_in_hold(self, name):
        """The ledger has opened a hold, if one was due, and nobody knows of it."""
        if name in self.shelf.leases:
            self.shelf.broken = True
            with suppress(Crash):
                done(self.market.leasing.hold_ahead(name, self.market.clock.now()))
            self.shelf.broken = False

    @rule()
    def pause(self):
        for name, own in self.shelf.leases.items():
            if own.state is not LeaseState.CLOSED:
                sight = self.market.sight(self.sight(name), name)
                done(self.market.leasing.pause(name, self.market.clock.now(), sight))
        self.restart()

    @rule()
    def send_twice(self):
        before = done(self.market.ledger.balance("acme"))
        done(self.shelf.send(forget=False))
        after = done(self.market.ledger.balance("acme"))
        done(self.shelf.send())
        assert done(self.market.ledger.balance("acme")) == after
        assert after.available_pico == before.available_pico

    @rule(number=hours)
    def pay(self, number):
        transfer = replace(
            deposit("1", f"deposit-{self.market.clock.monotonic()}-{self.deposited_pico}"),
            amount_pico=self.amount_pico(number),
        )
        done(self.market.ledger.transfer(transfer))
        self.deposited_pico += transfer.amount_pico

    @rule(name=st.sampled_from(NAMES), term_s=terms)
    def renew(self, name, term_s):
        own = self.shelf.leases.get(name)
        if own is None:
            return
        now = self.market.clock.now()
        try:
            end = rules.renewed_end(own, timedelta(seconds=term_s), now)
        except Conflict:
            return
        renewed = rules.step(replace(own, end=end), Event.RENEW, now, "renewed")
        done(self.shelf.keep(replace(renewed, noticed_at=None), ()))

    @rule(name=st.sampled_from(NAMES), event=st.sampled_from([*(None,) * 12, *ENDS]))
    def close(self, name, event):
        if event is not None and name in self.shelf.leases:
            now = self.market.clock.now()
            sight = self.market.sight(self.sight(name), name)
            done(self.market.leasing.close(name, event, now, sight, "why"))

    @invariant()
    def nobody_owes_anything(self):
        if hasattr(self, "market"):
            account = done(self.market.ledger.balance("acme"))
            assert account.held_pico >= 0
            assert account.available_pico >= 0

    @invariant()
    def never_more_than_two_holds_are_open(self):
        if hasattr(self, "market"):
            held = [
                h.request.hold_id.rpartition("-hold-")[0]
                for h in done(self.market.ledger.open_holds())
            ]
            assert all(held.count(name) <= 2 for name in NAMES)

    def teardown(self):
        """Whatever happened, in the end all is decided, paid and given back."""
        if not hasattr(self, "market"):
            return
        for name in self.shelf.leases:
            self.close(name, Event.RELEASE)
            done(self.market.hold(name))
        self.restart()
        for own in self.shelf.leases.values():
            assert rules.is_over(own)
            assert own.healthy_us + own.credited_us == (own.end - own.start) // rules.MICRO
            assert own.metered_until == own.end
        account = done(self.market.ledger.balance("acme"))
        charged_pico = sum(own.charged_pico for own in self.shelf.leases.values())
        assert account.held_pico == 0
        assert account.balance_pico == self.deposited_pico - charged_pico
        assert done(self.market.earned()) == charged_pico
        ended = self.market.ledger._books.holds.values()
        assert all(hold.state is HoldState.VOIDED for hold in ended)


LeaseMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLeases = LeaseMachine.TestCase


@given(
    term_s=st.sampled_from([3_600, 30_000, 90_000]),
    looks=st.lists(st.tuples(steps, st.sampled_from(RUNS), st.booleans()), min_size=2, max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_one_with_money_is_never_closed_for_want_of_it(term_s, looks):
    market = done(Market().open("1000"))
    done(market.grant(lease(term_s=term_s)))
    for seconds, run, restart in looks:
        market.clock.advance(seconds)
        if restart:
            market.last.clear()
        done(market.look(run))
        assert market.lease.close_reason in (None, CloseReason.EXPIRED)
