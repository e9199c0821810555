"""The scheduler under kills at named points and at any moment; a long soak is a script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CASES = 9


@pytest.mark.timeout(600)
def test_dozens_of_kills_lose_no_lease_and_double_no_charge():
    script = ROOT / "scripts" / "soak_scheduler.py"
    done = subprocess.run(
        [sys.executable, str(script), "--cases", str(CASES), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout)
    assert summary["kills"] >= 30
    # It was tortured while leases ran and were charged, not while nothing happened.
    assert summary["leases"] > 2 * CASES
    assert summary["charged_s"] > 3600 * CASES
