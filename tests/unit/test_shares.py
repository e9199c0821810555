"""What the scheduler tells gateways of each other, and how large the slices are that it grants."""

from dataclasses import replace

import pytest

from market.accounts import HoldResult, HoldStatus
from market.fairness import OUTPUT_WORK, PoolReport
from market.fakes import FakeClock
from market.scheduler.shares import RATE_TAU_S, RECALL_S, SILENT_S, GatewayReport, Shares
from market.types import HoldChange, Loan, RouteTable, SliceAsk
from tests.samples import ROUTE, hold_request

ROUTES = RouteTable((replace(ROUTE, places=10),), ())
PRICE = 1000


class Ledger:
    """Notes what is asked; answers what it was told to."""

    def __init__(self):
        self.asked = []
        self.answer = HoldResult(HoldStatus.EXCEEDS_BALANCE, None, 0)

    async def open_hold(self, request):
        self.asked.append((request.wanted_pico, request.minimum_pico))
        return self.answer

    async def resize_hold(self, producer, epoch, change):
        self.asked.append((change.wanted_pico, change.minimum_pico))
        return self.answer


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture
def shares(clock, ledger):
    return Shares(clock, ledger)


def pool(running=0, waiting=0, backlogged=(), **service):
    weights = dict.fromkeys({*service, *backlogged}, 1)
    return PoolReport(running, waiting, service, weights, frozenset(backlogged), {})


def sync(shares, name="gw0", epoch=1, keys=(), **pools):
    return shares.sync(GatewayReport(name, epoch, pools, frozenset(keys)), ROUTES)


def opening(wanted=10**9, minimum=PRICE, producer="gw0", tenant="acme", weight=1):
    request = hold_request(
        producer=producer, tenant_id=tenant, wanted_pico=wanted, minimum_pico=minimum
    )
    return SliceAsk(producer, 1, tenant, "tiny", weight, PRICE, opens=request)


class TestGrants:
    async def test_are_as_asked_while_nobody_waits(self, shares, ledger):
        sync(shares, tiny=pool(running=3, acme=100.0))
        await shares.grant(opening())
        change = HoldChange("slice-1", 2, 500, 200)
        await shares.grant(SliceAsk("gw0", 1, "acme", "tiny", 1, PRICE, changes=change))
        assert ledger.asked == [(10**9, PRICE), (500, 200)]

    async def test_are_a_fair_share_ahead_while_tenants_wait(self, shares, ledger, clock):
        served = 0.0
        for _ in range(60):  # 1,000 weighted tokens a second
            served += 500
            clock.advance(0.5)
            sync(shares, tiny=pool(10, 5, ("acme", "other"), acme=served / 2, other=served / 2))
        await shares.grant(opening())
        await shares.grant(opening(weight=3))
        small, large = (wanted for wanted, _ in ledger.asked)
        # Two seconds of its half of the pool, at the price of output.
        assert small - PRICE == pytest.approx(2 * 500 * PRICE, rel=0.1)
        assert large - PRICE == pytest.approx(2 * 750 * PRICE, rel=0.1)

    async def test_are_never_less_than_needed_nor_more_than_wanted(self, shares, ledger):
        sync(shares, tiny=pool(10, 5, ("acme", "other"), acme=1.0))
        await shares.grant(opening(wanted=7 * PRICE, minimum=7 * PRICE))
        change = HoldChange("slice-1", 2, 90 * PRICE, 2 * PRICE)
        has = 60 * PRICE  # requests reserve from it while this is asked
        await shares.grant(SliceAsk("gw0", 1, "acme", "tiny", 1, PRICE, has, changes=change))
        assert ledger.asked == [(7 * PRICE, 7 * PRICE), (60 * PRICE, 2 * PRICE)]


class TestRecalls:
    async def test_others_are_asked_for_money_that_one_misses(self, shares, ledger, clock):
        for name in ("gw0", "gw1"):
            sync(shares, name)
        ledger.answer = HoldResult(HoldStatus.EXCEEDS_UNTIL_OTHERS_END, None, 0, elsewhere_pico=5)
        await shares.grant(opening())
        assert sync(shares, "gw1").recalls == {"acme"}
        assert sync(shares, "gw0").recalls == frozenset()
        clock.advance(RECALL_S)
        assert sync(shares, "gw1").recalls == frozenset()

    async def test_nobody_is_asked_where_there_is_nothing(self, shares):
        for name in ("gw0", "gw1"):
            sync(shares, name)
        await shares.grant(opening())
        assert sync(shares, "gw1").recalls == frozenset()


class TestSync:
    def test_places_go_where_the_demand_is(self, shares):
        sync(shares, "gw0", tiny=pool(running=2))
        orders = sync(shares, "gw1", tiny=pool(running=1, waiting=20, backlogged=("a",)))
        assert orders.pools["tiny"].places == 8
        assert sync(shares, "gw0", tiny=pool(running=2)).pools["tiny"].places == 2

    def test_without_a_replica_nobody_knows_the_places(self, shares):
        report = GatewayReport("gw0", 1, {"tiny": pool(waiting=1)}, frozenset())
        assert shares.sync(report, RouteTable((), ())).pools["tiny"].places is None

    def test_a_silent_gateway_has_no_part(self, shares, clock):
        sync(shares, "gw0", tiny=pool(running=9, waiting=9, backlogged=("a",)))
        clock.advance(SILENT_S + 1)
        orders = sync(shares, "gw1", tiny=pool(running=1))
        assert orders.pools["tiny"].places == 10
        assert not shares.contended("tiny")

    def test_service_given_elsewhere_is_told(self, shares):
        sync(shares, "gw0", tiny=pool(1, 1, ("acme",)))
        sync(shares, "gw0", tiny=pool(1, 1, ("acme",), acme=300.0))
        orders = sync(shares, "gw1", tiny=pool(1, 1, ("acme",)))
        assert orders.pools["tiny"].counters["acme"] == 300.0

    def test_a_restarted_gateway_counts_from_zero(self, shares):
        sync(shares, "gw0", tiny=pool(1, 1, ("acme",)))
        sync(shares, "gw0", tiny=pool(1, 1, ("acme",), acme=300.0))
        sync(shares, "gw0", epoch=2, tiny=pool(1, 1, ("acme",), acme=0.0))
        orders = sync(shares, "gw0", epoch=2, tiny=pool(1, 1, ("acme",), acme=50.0))
        assert orders.pools["tiny"].counters["acme"] == 350.0

    def test_counters_survive_the_schedulers_death(self, shares, clock, ledger):
        fresh = Shares(clock, ledger)
        report = PoolReport(1, 0, {"acme": 900.0}, {"acme": 1}, frozenset(), {"acme": 700.0})
        orders = sync(fresh, "gw0", tiny=report)
        assert orders.pools["tiny"].counters["acme"] == 700.0
        orders = sync(fresh, "gw1", tiny=PoolReport(0, 0, {}, {}, frozenset(), {}))
        assert orders.pools["tiny"].counters["acme"] == 700.0

    def test_limits_of_a_key_are_shared_by_those_that_serve_it(self, shares):
        sync(shares, "gw0", keys=("key-1", "key-2"))
        orders = sync(shares, "gw1", keys=("key-1",))
        assert orders.key_gateways == {"key-1": 2}
        assert sync(shares, "gw0", keys=("key-1", "key-2")).key_gateways == {"key-1": 2, "key-2": 1}


class TestDemand:
    """What pools grow by."""

    def test_is_added_up_over_gateways(self, shares):
        sync(shares, "gw0", tiny=pool(running=3, waiting=1))
        sync(shares, "gw1", tiny=pool(running=2))
        demand = shares.demand("tiny")
        assert (demand.running, demand.waiting) == (5, 1)

    def test_kv_cache_is_that_of_all_replicas_by_what_all_gateways_have_on_it(self, shares):
        for name, used in (("gw0", {"a": 0.5, "b": 0.1}), ("gw1", {"a": 0.4})):
            report = GatewayReport(name, 1, {}, frozenset(), kv_used=used)
            shares.sync(report, ROUTES)
        assert shares.demand("tiny", ["a", "b"]).kv_used == pytest.approx(0.5)
        assert shares.demand("tiny", ["a"]).kv_used == pytest.approx(0.9)
        assert shares.demand("tiny").kv_used == 0

    def test_work_is_a_rate_that_fades(self, shares, clock):
        sync(shares, tiny=pool(acme=0.0))
        clock.advance(1)
        sync(shares, tiny=pool(acme=1000.0))
        assert shares.demand("tiny").work_per_s == pytest.approx(1000 / RATE_TAU_S)
        clock.advance(RATE_TAU_S)
        assert shares.demand("tiny").work_per_s == 0

    async def test_slices_count_when_they_are_granted_and_for_what_is_needed(self, shares, ledger):
        await shares.grant(opening(minimum=50 * PRICE))
        assert shares.demand("tiny").asked_per_s == 0  # it had no money
        ledger.answer = HoldResult(HoldStatus.GRANTED, object(), 0)
        await shares.grant(opening(wanted=10**12, minimum=50 * PRICE))
        assert shares.demand("tiny").asked_per_s == 50 * OUTPUT_WORK / RATE_TAU_S

    def test_what_runs_on_lent_leases_is_not_asked_of_the_pool(self, shares):
        """The holder's own request asks for four answers there; three are borrowed."""
        report = GatewayReport(
            "gw0",
            1,
            {"tiny": pool(running=5), "lease-1": pool(running=1)},
            frozenset(),
            streams={"leased": 7},
            borrowed={"leased": 3, "another": 1},
        )
        shares.sync(report, ROUTES)
        assert shares.demand("tiny", lent=["leased"]).running == 2

    def test_lent_places_are_told_apart_and_only_while_their_holder_is_idle(self, shares):
        lent = replace(ROUTE, app_name="leased", places=4, loan=Loan("lease-1", "lender"))
        routes = replace(ROUTES, lent=(lent,))

        def share(**pools):
            report = GatewayReport("gw0", 1, {"tiny": pool(running=1), **pools}, frozenset())
            found = shares.sync(report, routes).pools["tiny"]
            return found.places, found.lent

        assert share() == (10, 4)
        assert share(**{"lease-1": pool(running=1)}) == (10, 0)

    def test_gateways_are_told_how_many_they_are(self, shares):
        sync(shares, "gw0")
        assert sync(shares, "gw1").routes.gateways == 2
