#!/usr/bin/env python3
"""Torture the gateways' money: seeded worlds of requests, crashes, lost calls and outages.

    scripts/soak_gateways.py --events 1000000 --jobs 2    a long soak
    scripts/soak_gateways.py --first 4711 --events 1      one seed again

Each world (tests/faults/gateway_world.py) runs several gateways with the real admission, slices and
shares in virtual time, until everything comes to rest; the books must then agree exactly. Counted
are admissions, completions, crashes, and renewals and returns of slices. Exit code 1 and the seed
if anybody was overdrawn, a hold is left, or a record is lost or booked twice.
"""

import argparse
import logging
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.faults.gateway_world import run_world

REQUESTS = 5_000
COUNTED = ("admissions", "completions", "crashes", "grants", "returns")


def run_seed(seed: int) -> tuple[int, Counter[str], str | None]:
    """One world; the reason if it went wrong."""
    logging.disable(logging.CRITICAL)
    try:
        return seed, run_world(seed, REQUESTS), None
    except Exception:  # noqa: BLE001  # whatever it was, the seed must be reported
        return seed, Counter(), traceback.format_exc(limit=-4)


def main() -> int:
    """Run worlds until enough has happened and print what did."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--events", type=int, default=100_000, help="stop after so many")
    parser.add_argument("--jobs", type=int, default=2, help="worlds at the same time")
    options = parser.parse_args()
    began = time.monotonic()
    seen: Counter[str] = Counter()
    worlds = failed = 0
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        seeds = iter(range(options.first, sys.maxsize))
        running = [pool.apply_async(run_seed, (next(seeds),)) for _ in range(options.jobs)]
        while running:
            seed, counts, reason = running.pop(0).get()
            worlds += 1
            seen += counts
            if reason is not None:
                failed += 1
                print(f"seed {seed} failed:\n{reason}", flush=True)
            if not failed and sum(seen[name] for name in COUNTED) < options.events:
                running.append(pool.apply_async(run_seed, (next(seeds),)))
    events = sum(seen[name] for name in COUNTED)
    print(
        f"{worlds} worlds, {events:,} events in {time.monotonic() - began:.0f} s, {failed} failed"
    )
    for name, count in seen.most_common():
        print(f"  {count:>9,} {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
