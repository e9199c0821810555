"""A pool's day in numbers that can be worked out by hand."""

import pytest

from market.simulation.pools import Arrival, Machine, simulate
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
