#!/usr/bin/env python3
"""Torture the ledger: seeded cases of kills, bad networks and stepping clocks, with plain readers.

    scripts/soak_ledger.py --cases 1000 --jobs 2        a long soak
    scripts/soak_ledger.py --first 4711 --cases 1       one seed again

Each case kills a real ledger and its producers at named points and at any moment, and in the end
compares what was accepted with what is booked, to the last digit (tests/faults/harness.py). Exit
code 1 and the seed if anything is lost, doubled or wrong.
"""

import argparse
import json
import logging
import multiprocessing
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.faults import harness


def run_seeds(seeds: list[int], results: multiprocessing.Queue) -> None:
    """Run cases one after the other; a worker process of its own, because cases fork."""
    logging.disable(logging.CRITICAL)
    for seed in seeds:
        home = Path(tempfile.mkdtemp(prefix="soak-"))
        point = harness.LEDGER_POINTS[seed % len(harness.LEDGER_POINTS)] if seed % 3 else None
        try:
            case = harness.run_case(seed, home / "h", point)
            results.put((seed, None, case.points, case.reads, case.missing_files))
            shutil.rmtree(home)
        except Exception:  # noqa: BLE001  # whatever it was, the seed must be reported
            reason = "".join(traceback.format_exc().splitlines(keepends=True)[-12:])
            results.put((seed, f"{reason}\nkept: {home}", {}, 0, 0))
    results.put(None)


def main() -> int:
    """Run the cases asked for and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="cases at the same time")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    options = parser.parse_args()
    seeds = list(range(options.first, options.first + options.cases))
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=run_seeds, args=(seeds[job :: options.jobs], results))
        for job in range(options.jobs)
    ]
    for worker in workers:
        worker.start()
    points: Counter[str] = Counter()
    reads = missing = running = 0
    failures = []
    running = len(workers)
    while running:
        result = results.get()
        if result is None:
            running -= 1
            continue
        seed, failure, hit, read, gone = result
        points.update(hit)
        reads += read
        missing += gone
        if failure:
            failures.append(seed)
            print(f"seed {seed} FAILED\n{failure}", file=sys.stderr, flush=True)
    for worker in workers:
        worker.join()
    summary = {
        "cases": len(seeds),
        "failed_seeds": failures,
        "kills": sum(points.values()),
        "kills_per_point": dict(sorted(points.items())),
        "plain_reads_right": reads,
        "plain_reads_file_not_found": missing,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(summary, indent=None if options.json else 2))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
