"""A pool's day in numbers that can be worked out by hand."""

import pytest

from market.simulation import pools
from market.simulation.pools import Arrival, Gpus, Machine, simulate, simulate_shared
from market.types import Bounds

MACHINE = Machine(places=4, prompt_tokens_per_s=1000, output_tokens_per_s=50, start_s=20)
HOUR_PICO = 2 * 10**12


def test_one_request_on_a_cold_pool_costs_its_start_its_answer_and_the_keep_alive():
    arrivals = [Arrival(100.0, 1000, 500)]
    done = simulate(arrivals, MACHINE, Bounds(0, 2, keep_alive_s=60), HOUR_PICO, 1000)
    assert done.ttft_s == [pytest.approx(21.0)]
    assert (done.starts, done.peak) == (1, 1)
    assert done.replica_s == pytest.approx(20 + 1 + 10 + 60, abs=3)


def test_pool_that_is_always_on_waits_for_nothing():
    arrivals = [Arrival(100.0, 1000, 500)]
    done = simulate(arrivals, MACHINE, Bounds(1, 1), HOUR_PICO, 1000)
    assert done.ttft_s == [pytest.approx(1.0)]
    assert done.replica_s == pytest.approx(1000)


def test_burst_is_served_whole_by_as_many_as_it_needs():
    arrivals = [Arrival(10.0, 100, 100)] * 40
    done = simulate(arrivals, MACHINE, Bounds(0, 20, keep_alive_s=30), HOUR_PICO, 500)
    assert len(done.ttft_s) == 40
    assert done.peak == 13  # 40 requests on 80 % of four places each
    assert max(done.ttft_s) < 25


def test_same_day_twice_is_the_same():
    arrivals = [Arrival(n * 7.3 % 400, 100 + n, 50 + n) for n in range(200)]
    arrivals.sort(key=lambda a: a.at_s)
    one, two = (simulate(arrivals, MACHINE, Bounds(0, 9), HOUR_PICO, 2000) for _ in range(2))
    assert one == two
    assert len(one.ttft_s) == 200


def test_part_of_a_gpu_has_that_part_of_places_and_prompts_and_at_least_one_place():
    assert MACHINE.part(0.5) == Machine(2, 500, 50, 20)
    assert MACHINE.part(0.01).places == 1


def test_rounds_left_out_change_next_to_nothing(monkeypatch):
    arrivals = [Arrival(n * n % 3600 + n / 500, 100 + n % 900, n % 300) for n in range(500)]
    arrivals.sort(key=lambda a: a.at_s)
    some = simulate(arrivals, MACHINE, Bounds(0, 9), HOUR_PICO, 4000)
    monkeypatch.setattr(pools._Pool, "next_round_s", lambda _pool, now_s: now_s // 0.5 * 0.5 + 0.5)
    every = simulate(arrivals, MACHINE, Bounds(0, 9), HOUR_PICO, 4000)
    assert some.replica_s == pytest.approx(every.replica_s, rel=0.05)
    assert sum(some.ttft_s) == pytest.approx(sum(every.ttft_s), rel=0.05)


def test_pool_is_kept_by_answers_that_end_before_its_next_round():
    arrivals = [Arrival(second, 1, 30) for second in range(100, 400, 20)]
    done = simulate(arrivals, MACHINE, Bounds(0, 1, keep_alive_s=60), HOUR_PICO, 1000)
    assert done.starts == 1


def shared(days: list[list[Arrival]], gpus: Gpus, maximum: int = 1):
    return simulate_shared(days, MACHINE, Bounds(0, maximum), HOUR_PICO, 1000, gpus)


def test_who_asks_puts_an_idle_replica_of_another_pool_out_and_waits_for_the_switch():
    first, second = [Arrival(0.0, 1000, 50)], [Arrival(60.0, 1000, 50)]
    one, two = shared([first, second], Gpus(1, 1000, 5.0))
    assert (one.evicted, two.evicted) == (0, 1)
    assert two.ttft_s == [pytest.approx(26.0)]
    assert one.replica_s == pytest.approx(60)


def test_replica_that_serves_is_never_put_out():
    first, second = [Arrival(0.0, 1000, 5000)], [Arrival(60.0, 1000, 50)]
    one, two = shared([first, second], Gpus(1, 1000, 0.0))
    assert one.ttft_s == [pytest.approx(21.0)]
    # The first ends after 121 s and is idle for three more.
    assert two.ttft_s == [pytest.approx(124 - 60 + 21, abs=1)]


def test_two_pools_on_halves_of_a_gpu_do_not_disturb_each_other():
    day = [Arrival(0.0, 1000, 50), Arrival(100.0, 1000, 50)]
    outcomes = shared([day, day], Gpus(1, 500, 5.0))
    assert [(o.starts, o.evicted) for o in outcomes] == [(1, 0), (1, 0)]
    assert outcomes[0] == simulate(day, MACHINE, Bounds(0, 1), HOUR_PICO, 1000)


def test_gpus_are_never_oversubscribed():
    days = [[Arrival(n * 60.0 + 7 * pool, 500, 400) for n in range(15)] for pool in range(8)]
    outcomes = shared(days, Gpus(1, 250, 1.0), 8)
    assert sum(outcome.replica_s for outcome in outcomes) <= 4 * 1000
    assert sum(outcome.evicted for outcome in outcomes) > 0
