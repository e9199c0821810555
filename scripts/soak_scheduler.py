#!/usr/bin/env python3
"""Torture the scheduler: seeded cases of kills, dying nodes, lost answers and hours that pass.

    scripts/soak_scheduler.py                           about 200 kills
    scripts/soak_scheduler.py --cases 1000 --jobs 2     a long soak
    scripts/soak_scheduler.py --first 4711 --cases 1    one seed again

Each case kills a real scheduler and its ledger at named points and at any moment, compares what is
stored with what was committed, and in the end recomputes every lease from the ledger's rows
(tests/faults/scheduler_harness.py). Exit code 1 and the seed if anything is lost, doubled or wrong.
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

from tests.faults import scheduler_harness as harness

CASES = 40
# A kill is no power cut: nothing is lost that a file system in memory keeps, and it is faster.
MEMORY = Path("/dev/shm")


def run_seeds(seeds: list[int], results: multiprocessing.Queue) -> None:
    """Run cases one after the other; a worker process of its own, because cases fork."""
    logging.disable(logging.CRITICAL)
    folder = MEMORY if MEMORY.is_dir() else None
    for seed in seeds:
        home = Path(tempfile.mkdtemp(prefix="soak-", dir=folder))
        point = harness.POINTS[seed // 4 % len(harness.POINTS)] if seed % 4 > 1 else None
        try:
            case = harness.run_case(seed, home / "h", point)
            results.put((seed, None, case.points, case.counts))
            shutil.rmtree(home)
        except Exception:  # noqa: BLE001  # whatever it was, the seed must be reported
            reason = "".join(traceback.format_exc().splitlines(keepends=True)[-12:])
            results.put((seed, f"{reason[-6000:]}\nkept: {home}", {}, {}))
    results.put(None)


def main() -> int:
    """Run the cases asked for and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--cases", type=int, default=CASES, help="about five kills each")
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
    counts: Counter[str] = Counter()
    failures = []
    running = len(workers)
    while running:
        result = results.get()
        if result is None:
            running -= 1
            continue
        seed, failure, hit, counted = result
        points.update(hit)
        counts.update(counted)
        if failure:
            failures.append(seed)
            again = f"scripts/soak_scheduler.py --first {seed} --cases 1"
            print(f"seed {seed} FAILED, again: {again}\n{failure}", file=sys.stderr, flush=True)
    for worker in workers:
        worker.join()
    summary = {
        "cases": len(seeds),
        "failed_seeds": failures,
        "kills": sum(points.values()),
        **counts,
        "seconds": round(time.monotonic() - started, 1),
        "kills_per_point": dict(sorted(points.items())),
    }
    print(json.dumps(summary) if options.json else table(summary))
    return 1 if failures else 0


def table(summary: dict[str, object]) -> str:
    """The summary as lines of a name and a number."""
    points = summary.pop("kills_per_point")
    assert isinstance(points, dict)
    lines = [*summary.items(), ("", ""), *((f"killed at {name}", n) for name, n in points.items())]
    rows = (f"{name.replace('_', ' '):32}{value!s:>12}".rstrip() for name, value in lines)
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
