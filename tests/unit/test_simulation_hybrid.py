"""Hybrid replays with virtual time: what must hold whatever the trace."""

from hypothesis import given
from hypothesis import strategies as st

from market.simulation.hybrid import simulate_hybrid
from market.simulation.pools import Arrival, Machine

MACHINE = Machine(places=2, prompt_tokens_per_s=1000, output_tokens_per_s=10, start_s=5)
TRACES = st.lists(
    st.tuples(st.floats(0, 100), st.integers(1, 500), st.integers(1, 50)), min_size=1, max_size=60
).map(lambda rows: [Arrival(*row) for row in sorted(rows)])


@given(TRACES, st.integers(1, 3))
def test_a_lease_alone_serves_everybody_in_time(trace, replicas):
    outcome = simulate_hybrid(trace, MACHINE, replicas, None)
    assert outcome.spilled == 0
    assert len(outcome.ttft_s) == len(trace)
    assert min(outcome.ttft_s) >= 0


@given(TRACES, st.integers(0, 3))
def test_every_request_is_served_once_and_spills_are_counted(trace, replicas):
    outcome = simulate_hybrid(trace, MACHINE, replicas, 0.5)
    assert len(outcome.ttft_s) == len(trace)
    assert outcome.spilled_output_tokens >= outcome.spilled
    if replicas == 0:
        assert outcome.spilled == len(trace)


@given(TRACES)
def test_what_fits_the_lease_never_spills(trace):
    slowest_s = 500 / MACHINE.prompt_tokens_per_s
    assert simulate_hybrid(trace, MACHINE, 60, slowest_s).spilled == 0


def test_a_burst_spills_what_would_wait_and_the_rest_stays():
    burst = [Arrival(0.0, 10, 10) for _ in range(10)]
    outcome = simulate_hybrid(burst, MACHINE, 1, 0.5)
    assert (outcome.spilled, len(outcome.ttft_s)) == (8, 10)
    assert max(outcome.ttft_s) < 0.5
    later = [*burst, Arrival(5.0, 10, 10)]
    assert simulate_hybrid(later, MACHINE, 1, 0.5).spilled == 8
