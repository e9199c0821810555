"""The ledger under kills, full disks, zombies and bad networks; a long soak is a script."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import harness

ROOT = Path(__file__).parent.parent.parent
CASES = 60


@pytest.mark.timeout(1200)
def test_a_hundred_kills_lose_nothing_and_double_nothing():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "soak_ledger.py"), "--cases", str(CASES), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout)
    assert summary["kills"] > 100
    never = set(harness.LEDGER_POINTS + harness.RECORD_POINTS + harness.SWEEP_POINTS)
    never -= set(summary["kills_per_point"])
    assert not never, f"no case died at {never}"
    assert summary["plain_reads_right"] > 10 * CASES


@pytest.mark.timeout(120)
def test_full_disk_stops_admission_and_heals_by_itself(tmp_path):
    """On a real small file system, in a mount namespace of its own."""
    inside = [sys.executable, "-m", "tests.faults.full_disk", str(tmp_path)]
    mount = 'mount -t tmpfs -o size=48m none "$1" && shift && exec "$@"'
    shell = ["sh", "-c", mount, "sh", str(tmp_path), *inside]
    unshare = ["unshare", "--map-root-user", "--mount"]
    probe = subprocess.run(
        [*unshare, "sh", "-c", f"mount -t tmpfs none {tmp_path}"], capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip("this machine lets nobody mount a tmpfs in a user namespace")
    done = subprocess.run([*unshare, *shell], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.timeout(120)
def test_zombie_ledger_keeps_the_books_until_it_is_dead(tmp_path):
    """One that was stopped, not killed, may wake up: nobody else may write meanwhile."""
    script = (
        "import asyncio, sys; sys.path.insert(0, '.')\n"
        "from pathlib import Path\n"
        "from market.clock import SystemClock\n"
        "from market.config import Config\n"
        "from market.ledger import service\n"
        "service.LOCK_PATIENCE_S = 0.5\n"
        "async def main():\n"
        "    ledger = service.Ledger(Config(Path(sys.argv[1]), 'http://x:1'), SystemClock())\n"
        "    await ledger.open()\n"
        "    await ledger.create_tenant(sys.argv[2])\n"
        "    print('open', flush=True)\n"
        "    if sys.argv[2] == 'zombie':\n"
        "        await asyncio.sleep(3600)\n"
        "    print(await ledger.tenants())\n"
        "    await ledger.close()\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    zombie = subprocess.Popen([*command, "zombie"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert zombie.stdout.readline() == "open\n"
        os.kill(zombie.pid, signal.SIGSTOP)
        refused = subprocess.run(
            [*command, "heir"], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert refused.returncode != 0
        assert "another process holds" in refused.stderr
    finally:
        zombie.kill()
        zombie.wait()
        zombie.stdout.close()
    heir = subprocess.run([*command, "heir"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert heir.stdout.splitlines()[-1] == "['heir', 'zombie']", heir.stderr
