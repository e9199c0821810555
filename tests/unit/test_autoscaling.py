"""How many replicas: up at once, down late, never beyond what is allowed, always with a reason."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from market import autoscaling
from market.autoscaling import Busy, Costs, Demand, Idler, Signal, Snapshot, decide
from market.types import Bounds

HOUR_PICO = 2 * 10**12
COSTS = Costs(HOUR_PICO, start_s=40.0)
POOL = Snapshot(Bounds(0, 8), COSTS, Demand(), places=10, replicas=1, serving=1, peak=1)


def asked(pool=POOL, **demand):
    return replace(pool, demand=Demand(**demand))


def priced(pool):
    """All its replicas, and the next, at one price."""
    return replace(pool, hours_pico=(HOUR_PICO,) * pool.replicas, next_pico=HOUR_PICO)


class TestUp:
    def test_one_request_wakes_a_cold_pool(self):
        cold = replace(POOL, replicas=0, serving=0, peak=0)
        decision = decide(asked(cold, cold=1))
        assert (decision.replicas, decision.signal) == (1, Signal.REQUESTS)
        assert "1 request(s)" in decision.reason

    def test_burst_on_a_cold_pool_starts_as_many_as_it_needs_at_once(self):
        cold = replace(POOL, replicas=0, serving=0, peak=0)
        assert decide(asked(cold, cold=40)).replicas == 5

    def test_places_in_use(self):
        assert decide(asked(running=8)).replicas == 1
        assert decide(asked(running=9)).replicas == 2

    def test_what_starts_already_is_not_started_again(self):
        starting = replace(POOL, replicas=3, serving=1)
        assert decide(asked(starting, running=10, waiting=8)).replicas == 3

    def test_long_queue_though_places_would_do(self):
        decision = decide(asked(running=5, waiting=3, finished_per_s=0.1))
        assert (decision.signal, decision.replicas) == (Signal.BACKLOG, 2)
        assert "30 s" in decision.reason

    def test_bounds_and_budget_end_it(self):
        decision = decide(asked(running=500))
        assert (decision.replicas, decision.signal) == (8, Signal.BOUNDS)
        poor = priced(replace(POOL, bounds=Bounds(0, 8, spend_max_pico=3 * HOUR_PICO + 1)))
        decision = decide(asked(poor, running=500))
        assert (decision.replicas, decision.signal) == (3, Signal.BUDGET)
        assert "pays for 3" in decision.reason

    def test_minimum_comes_before_the_budget(self):
        poor = priced(replace(POOL, bounds=Bounds(2, 8, spend_max_pico=HOUR_PICO)))
        assert decide(asked(poor, running=500)).replicas == 2

    def test_budget_counts_what_is_there_at_its_own_prices(self):
        """One more is paid for at its place's price, and those that are there stay."""
        bounds = Bounds(0, 8, spend_max_pico=5)
        two = replace(POOL, bounds=bounds, replicas=2, hours_pico=(3, 1), next_pico=1)
        assert decide(asked(two, running=500)).replicas == 3
        assert decide(asked(replace(two, next_pico=2), running=500)).replicas == 2
        assert decide(asked(replace(two, next_pico=None), running=500)).replicas == 8
        assert decide(asked(replace(two, hours_pico=(3, 3)), running=500)).replicas == 1


class TestLimits:
    """What serves is close to what it can do."""

    def test_kv_cache_in_use(self):
        full = asked(running=3, kv_used=0.9)
        assert (decide(full).replicas, decide(full).signal) == (2, Signal.KV)
        assert decide(full).reason == "90% of the KV cache"
        assert decide(asked(running=3, kv_used=0.8)).replicas == 1

    def test_work_against_what_a_replica_has_been_seen_to_do(self):
        known = replace(POOL, speed=100.0)
        busy = asked(known, running=3, work_per_s=90.0)
        assert (decide(busy).replicas, decide(busy).signal) == (2, Signal.WORK)
        assert decide(asked(known, running=3, work_per_s=80.0)).replicas == 1
        assert decide(asked(running=3, work_per_s=90.0)).replicas == 1  # nobody knows its speed

    def test_slices_that_are_asked_for_come_before_the_work(self):
        known = replace(POOL, speed=100.0)
        rush = asked(known, running=1, asked_per_s=1000.0)
        # No more than twice as many: what is asked for need not be used.
        assert (decide(rush).replicas, decide(rush).signal) == (2, Signal.SLICES)

    def test_speed_is_learned_from_a_full_pool_only(self):
        memory = autoscaling.Memory(0.0)
        memory.decide(asked(running=3, work_per_s=50.0), 0.0)
        assert memory.speed == 0
        memory.decide(asked(running=10, waiting=1, work_per_s=20.0), 1.0)
        assert memory.speed == 0  # rates are means: a burst says little at first
        memory.decide(asked(running=10, waiting=1, work_per_s=120.0), 20.0)
        memory.decide(asked(running=10, waiting=1, work_per_s=70.0), 21.0)
        assert memory.speed == 120
        memory.decide(asked(running=10, work_per_s=150.0), 22.0)
        assert memory.speed == 150  # it can do what it does


class TestAhead:
    def test_what_is_usual_is_there_before_anybody_asks(self):
        cold = replace(POOL, replicas=0, serving=0, peak=0, ahead=2)
        decision = decide(cold)
        assert (decision.replicas, decision.signal) == (2, Signal.FORECAST)

    def test_idle_for_long_it_is_kept_while_somebody_is_expected(self):
        idle = replace(POOL, replicas=3, serving=3, peak=0, idle_s=10_000.0)
        assert decide(replace(idle, ahead=1)).replicas == 1
        assert decide(idle).replicas == 0

    def test_keep_alive_is_stretched_but_not_what_the_operator_says(self):
        usual = autoscaling.keep_alive_s(Bounds(), COSTS)
        assert autoscaling.keep_alive_s(Bounds(), COSTS, 0.5) == usual / 2
        said = Bounds(keep_alive_s=7.0)
        assert autoscaling.keep_alive_s(said, COSTS, 4.0) == 7.0
        idle = replace(POOL, peak=0, idle_s=usual * 0.6)
        assert decide(idle).replicas == 1
        assert decide(replace(idle, stretch=0.5)).replicas == 0

    def test_bounds_and_budget_hold_all_the_same(self):
        paid = priced(replace(POOL, bounds=Bounds(0, 8, spend_max_pico=HOUR_PICO), ahead=4))
        assert decide(paid).signal is Signal.BUDGET
        assert decide(paid).replicas == 1


class TestDown:
    def test_only_to_what_was_not_needed_for_a_while(self):
        wide = replace(POOL, replicas=4, serving=4)
        assert decide(asked(replace(wide, peak=3), running=1)).replicas == 3
        assert decide(asked(replace(wide, peak=1), running=1)).replicas == 1

    def test_not_to_zero_while_anybody_is_served(self):
        assert decide(replace(asked(running=1), idle_s=1e9)).replicas == 1

    def test_to_zero_when_holding_has_cost_as_much_as_waking_would(self):
        even_s = autoscaling.keep_alive_s(POOL.bounds, COSTS)
        assert even_s == pytest.approx(40 * (1 + 10 / 2))
        assert decide(replace(POOL, peak=0, idle_s=even_s - 1)).replicas == 1
        decision = decide(replace(POOL, peak=0, idle_s=even_s))
        assert (decision.replicas, decision.signal) == (0, Signal.IDLE)

    def test_to_the_minimum_only(self):
        kept = replace(POOL, bounds=Bounds(1, 8), peak=0, idle_s=1e9)
        assert decide(kept).replicas == 1

    def test_keep_alive_is_what_the_operator_says(self):
        told = replace(POOL, bounds=Bounds(0, 8, keep_alive_s=5), peak=0, idle_s=5)
        assert decide(told).replicas == 0

    def test_dearer_places_are_kept_shorter(self):
        cheap, dear = (Costs(hour, 40.0) for hour in (HOUR_PICO // 4, HOUR_PICO * 4))
        assert autoscaling.keep_alive_s(POOL.bounds, cheap) > autoscaling.keep_alive_s(
            POOL.bounds, dear
        )


demands = st.builds(
    Demand,
    running=st.integers(0, 300),
    waiting=st.integers(0, 300),
    cold=st.integers(0, 300),
    finished_per_s=st.floats(0, 100),
    work_per_s=st.floats(0, 10_000),
    asked_per_s=st.floats(0, 10_000),
    kv_used=st.floats(0, 1),
)
prices = st.integers(0, 5 * HOUR_PICO)


@st.composite
def snapshots(draw):
    least, more = draw(st.integers(0, 5)), draw(st.integers(0, 20))
    hours = tuple(draw(st.lists(prices, max_size=30)))
    return Snapshot(
        bounds=Bounds(least, max(1, least + more), draw(st.none() | prices)),
        costs=COSTS,
        demand=draw(demands),
        places=10,
        replicas=len(hours),
        serving=draw(st.integers(0, len(hours))),
        hours_pico=hours,
        next_pico=draw(st.none() | prices),
        speed=draw(st.floats(0, 1_000)),
        ahead=draw(st.integers(0, 3)),
        stretch=draw(st.floats(0.5, 4)),
        peak=draw(st.integers(0, 30)),
        idle_s=draw(st.floats(0, 10_000)),
    )


@given(snapshots())
def test_never_out_of_bounds_and_never_none_for_who_is_served(pool):
    decision, bounds = decide(pool), pool.bounds
    assert bounds.minimum <= decision.replicas <= bounds.maximum
    assert decision.reason
    if bounds.spend_max_pico is None:
        assert decision.replicas >= 1 or pool.demand.idle
        return
    kept = sorted(pool.hours_pico)[: decision.replicas]
    more = (decision.replicas - len(kept)) * (pool.next_pico or 0)
    assert sum(kept) + more <= bounds.spend_max_pico or decision.replicas <= bounds.minimum


@pytest.mark.parametrize(
    ("of_one", "replicas"),
    [
        # A burst of requests every 30 s; all else steadily asks for 90 % of one replica.
        (lambda second, n: {"running": 40 if second % 30 < 5 else 2}, 5),
        (lambda _, n: {"running": 1, "kv_used": 0.9 / n}, 2),
        (lambda _, n: {"running": 1, "work_per_s": 90.0}, 2),
        (lambda _, n: {"running": 1, "asked_per_s": 90.0}, 2),
    ],
)
def test_steady_load_and_one_that_comes_and_goes_do_not_flap(of_one, replicas):
    memory, there, starts = autoscaling.Memory(0.0), 1, 0
    for second in range(1800):
        pool = replace(POOL, replicas=there, serving=there, speed=100.0)
        wanted = memory.decide(asked(pool, **of_one(second, there)), float(second)).replicas
        starts += max(0, wanted - there)
        there = wanted
    assert (there, starts) == (replicas, replicas - 1)


def test_what_is_there_is_kept_for_a_while_by_who_remembers_nothing():
    memory, pool = autoscaling.Memory(0.0), replace(POOL, replicas=4, serving=4)
    assert memory.decide(asked(pool, running=1), 0.0).replicas == 4
    assert memory.decide(asked(pool, running=1), autoscaling.STABLE_S + 1).replicas == 1


class TestWho:
    def test_what_does_not_serve_yet_then_the_emptiest_then_the_newest_goes(self):
        replicas = [
            Busy("old", 2, True, 1.0),
            Busy("full", 9, True, 2.0),
            Busy("new", 2, True, 3.0),
            Busy("starts", 0, False, 4.0),
        ]
        assert autoscaling.to_drain(replicas, 3) == ["starts", "new", "old"]
        replicas.append(Busy("dear", 9, True, 5.0, hour_pico=3))
        assert autoscaling.to_drain(replicas, 2, dearest=True) == ["dear", "starts"]

    def test_least_recently_used_makes_room_and_no_more_than_needed(self):
        idlers = [
            Idler("a", "n/0", 300, 10),
            Idler("b", "n/0", 300, 500),
            Idler("c", "n/0", 300, 90),
        ]
        assert autoscaling.to_evict(idlers, {"n/0": 300}) == ["b"]
        assert autoscaling.to_evict(idlers, {"n/0": 600}) == ["b", "c"]
        assert autoscaling.to_evict(idlers, {"n/0": 1000}) == []

    def test_gpu_whose_replicas_are_worth_least(self):
        idlers = [Idler("a", "n/0", 500, 10), Idler("b", "n/1", 500, 900)]
        assert autoscaling.to_evict(idlers, {"n/0": 500, "n/1": 500}) == ["b"]
        assert autoscaling.to_evict(idlers, {"n/0": 100, "n/1": 600}) == ["a"]

    def test_what_is_back_soon_is_worth_less(self):
        idlers = [Idler("a", "n/0", 500, 60, back_s=300), Idler("b", "n/0", 500, 50, back_s=2)]
        assert autoscaling.to_evict(idlers, {"n/0": 500}) == ["b"]
