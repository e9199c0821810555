"""Several gateways over one ledger, and everything dies; scripts/soak_gateways.py runs more."""

import pytest

from tests.faults.gateway_world import run_world


@pytest.mark.parametrize("seed", range(8))
def test_nobody_is_overdrawn_and_everything_is_resolved(seed):
    seen = run_world(seed, 2500)
    assert seen["completions"] > 200
    assert seen["grants"] > 200
    assert seen["answers lost"] > 0
