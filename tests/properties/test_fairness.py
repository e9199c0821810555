"""The bound of VTC for tenants that wait all the time, at one gateway and over several."""

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from market.fairness import (
    OUTPUT_WORK,
    FairQueue,
    PoolLedger,
    PoolReport,
    deal,
    input_work,
    merge,
    spare,
)

INPUT_MAX, OUTPUT_MAX = 512, 256


class Pool:
    """A pool in steps: each step every request under way is given one token.

    Several gateways have a queue each; every ``every`` steps they report and are told, as the
    scheduler does it.
    """

    def __init__(self, rng, weights, places, gateways=1, every=1):
        self.rng, self.weights, self.places, self.every = rng, weights, places, every
        self.queues = [FairQueue(places, 10**9, 10**9) for _ in range(gateways)]
        self.ledger = PoolLedger()
        self.running = [{} for _ in self.queues]
        self.served = defaultdict(float)
        self.steps = self.made = self.idle = 0
        if gateways > 1:
            self.sync()

    def add(self, tenant, gateway=0, tokens=None):
        given, wanted = tokens or (
            self.rng.randint(1, INPUT_MAX),
            self.rng.randint(1, OUTPUT_MAX),
        )
        self.made += 1
        request_id = f"{tenant}-{self.made}"
        self.queues[gateway].add(request_id, tenant, self.weights[tenant], input_work(given))
        self.running[gateway][request_id] = [tenant, given, wanted, False]

    def step(self):
        self.steps += 1
        if len(self.queues) > 1 and self.steps % self.every == 0:
            self.sync()
        for queue, requests in zip(self.queues, self.running, strict=True):
            while (request_id := queue.take()) is not None:
                requests[request_id][3] = True
                self.served[requests[request_id][0]] += input_work(requests[request_id][1])
            if queue.waiting and queue.running < queue.places:
                self.idle += 1
            for request_id, request in list(requests.items()):
                if request[3]:
                    queue.serve(request_id, 1)
                    self.served[request[0]] += OUTPUT_WORK
                    request[2] -= 1
                    if request[2] == 0:
                        queue.finish(request_id)
                        del requests[request_id]

    def sync(self):
        for number, queue in enumerate(self.queues):
            queue.forget_gone()
            report = PoolReport(
                running=queue.running,
                waiting=queue.waiting,
                service=dict(queue.service),
                weights=queue.weights(),
                backlogged=queue.counters.active,
                counters=queue.counters.snapshot(),
            )
            self.ledger.report(f"gw{number}", report)
        for number, queue in enumerate(self.queues):
            merge(queue, self.ledger.share(f"gw{number}", self.places))

    def waits(self, tenant, gateway=0):
        return self.queues[gateway].waiting_of(tenant)


def bound(weights, places):
    """2U over the smallest weight: U is the longest input, or all outputs that may be under way."""
    under_way = OUTPUT_WORK * OUTPUT_MAX * (places + spare(places))
    return 2 * max(input_work(INPUT_MAX), under_way) / min(weights.values())


def gap(served, weights, tenants):
    shares = [served[tenant] / weights[tenant] for tenant in tenants]
    return max(shares) - min(shares)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.integers(1, 8), min_size=2, max_size=8),
    places=st.integers(1, 16),
)
def test_backlogged_tenants_get_service_by_weight(seed, weights, places):
    names = {f"t{n}": weight for n, weight in enumerate(weights)}
    pool = Pool(random.Random(seed), names, places)
    for _ in range(1500):
        for tenant in names:
            while pool.waits(tenant) < 2:
                pool.add(tenant)
        pool.step()
        assert gap(pool.served, names, names) <= bound(names, places)
    assert pool.idle == 0  # a place never stays empty while anybody waits


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    gateways=st.integers(2, 4),
    every=st.integers(1, 40),
)
def test_over_several_gateways_the_bound_grows_by_what_is_served_between_reports(
    seed, gateways, every
):
    rng = random.Random(seed)
    names = {"a": 1, "b": 2, "c": 4}
    places = 8
    pool = Pool(rng, names, places, gateways, every)
    # Between two reports: the steps' output, and inputs of whatever begins in them.
    stale = places * gateways * (every * OUTPUT_WORK + input_work(INPUT_MAX)) / min(names.values())
    for _ in range(1500):
        for tenant in names:
            for gateway in range(gateways):
                while pool.waits(tenant, gateway) < 2:
                    pool.add(tenant, gateway)
        pool.step()
        assert gap(pool.served, names, names) <= bound(names, places) + 2 * stale


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), away=st.integers(1, 2000))
def test_being_away_earns_nothing(seed, away):
    """A tenant that comes back does not make the others wait for what it did not ask."""
    rng = random.Random(seed)
    names = {"steady": 1, "back": 1}
    pool = Pool(rng, names, 4)
    for step in range(away + 800):
        while pool.waits("steady") < 2:
            pool.add("steady")
        if step == away:
            before = dict(pool.served)
        if step >= away:
            while pool.waits("back") < 2:
                pool.add("back")
        pool.step()
        if step >= away:
            got = {name: pool.served[name] - before.get(name, 0.0) for name in names}
            assert got["back"] - got["steady"] <= bound(names, 4)


def flooded(places, **weights):
    """A pool that one tenant has filled for long."""
    pool = Pool(random.Random(3), {"flood": 1} | weights, places)
    for _ in range(500):
        pool.add("flood", tokens=(10, 20))
    for _ in range(210):
        pool.step()
    assert pool.queues[0].running == places  # spare places are not for who floods
    return pool


def test_a_newcomer_does_not_wait_for_a_flood():
    pool = flooded(2, quiet=1)
    pool.add("quiet", tokens=(10, 1))
    pool.step()
    assert pool.served["quiet"] > 0


def test_a_newcomer_who_floods_too_waits_its_turn():
    pool = flooded(8, second=1)
    for _ in range(100):
        pool.add("second", tokens=(10, 20))
    pool.step()
    assert pool.queues[0].running == 8


def test_spare_places_are_for_those_below_their_share():
    """One that asks one at a time, but for far more than its share, is served by turns in the end.

    Once what it had not used is used up, it waits for its turn like the others.
    """
    pool = flooded(8, greedy=1)
    queue = pool.queues[0]
    waited = False
    for _ in range(600):
        if not pool.waits("greedy"):
            pool.add("greedy", tokens=(500, 200))
        pool.step()
        assert queue.running <= 8 + spare(8)
        waited = waited or (queue.running == 8 and pool.waits("greedy") == 1)
    assert waited


@pytest.mark.parametrize("seed", range(3))
def test_who_asks_for_half_of_its_share_hardly_ever_waits(seed):
    rng = random.Random(seed)
    weights = {"modest": 4} | {f"t{n}": n for n in range(1, 9)}
    places, tokens = 16, 32
    pool = Pool(rng, weights, places)
    # Requests a step: half of its share of one answer each ``tokens`` steps at every place.
    rate = 0.5 * weights["modest"] / sum(weights.values()) * places / tokens
    asked, late, due, steps = 0, 0, 0.0, 3000
    for step in range(steps):
        for name in sorted(weights.keys() - {"modest"}):
            while pool.waits(name) < 3:
                pool.add(name, tokens=(20, rng.randint(1, 2 * tokens - 1)))
        while due <= step:
            due += rng.expovariate(rate)
            pool.add("modest", tokens=(20, tokens))
            asked += 1
        pool.step()
        late += pool.waits("modest") > 0
    assert asked > 50
    assert late <= 0.02 * steps


def test_service_counts_by_weight_though_its_tenant_is_gone_when_it_is_reported():
    pool = Pool(random.Random(1), {"heavy": 4, "light": 1}, places=4, gateways=2)
    for tenant in ("heavy", "light"):
        pool.add(tenant, tokens=(40, 1))
    pool.step()
    pool.step()
    pool.sync()
    counters = pool.ledger.counters
    assert counters.get("light") == 42
    assert counters.get("heavy") == 42 / 4


def test_tenants_that_came_once_are_forgotten_and_nobody_else_is():
    weights = {"steady": 1} | {f"once{n}": 1 for n in range(400)}
    pool = Pool(random.Random(2), weights, places=4, gateways=2, every=5)
    for n in range(400):
        while pool.waits("steady") < 2:
            pool.add("steady", tokens=(100, 20))
        pool.add(f"once{n}", gateway=n % 2, tokens=(10, 3))
        for _ in range(4):
            pool.step()
    pool.sync()
    pool.sync()
    for counters in (pool.ledger.counters, *(queue.counters for queue in pool.queues)):
        assert "steady" in counters.snapshot()
        assert len(counters.snapshot()) < 150  # those not yet so far behind
    assert all(len(queue.service) < 20 for queue in pool.queues)


@settings(max_examples=200, deadline=None)
@given(
    places=st.integers(0, 100),
    demands=st.dictionaries(
        st.sampled_from([f"gw{n}" for n in range(6)]), st.integers(0, 80), min_size=1
    ),
)
def test_places_are_dealt_max_min_fair(places, demands):
    shares = deal(places, demands)
    assert shares.keys() == demands.keys()
    assert all(share >= 1 for share in shares.values())
    assert sum(shares.values()) <= max(places + len(demands), len(demands))
    wanted = sum(demands.values())
    if wanted <= places:
        assert all(shares[name] >= need for name, need in demands.items())
    for name, share in shares.items():
        if share < demands[name]:  # it wants more: nobody has more than it by over one place
            assert max(shares.values()) <= share + 1


@pytest.mark.parametrize("places", [0, 1, 7])
def test_dealing_is_exact_where_all_want_more(places):
    shares = deal(places, {"gw0": 50, "gw1": 50})
    assert sum(shares.values()) == max(places, 2)
