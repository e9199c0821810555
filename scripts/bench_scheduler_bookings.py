#!/usr/bin/env python3
"""The booking calendar: how many leases a second it books, and whether it is ever wrong.

    .venv/bin/python scripts/bench_scheduler_bookings.py [--leases N] [--operations N] [--seed N]

First leases are booked over 182 days on 64 nodes of 8 GPUs until there are 20,000; only calls of
the calendar are timed. Then random operations, time moving forward, on a small cluster: every
answer is compared with that of arrays of time slots, which share no code with the calendar.
Exit code 1 if any answer is wrong.
"""

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from market.calendar import Calendar, Oversubscribed

HOUR_US = 3_600 * 10**6
SPAN_US = 182 * 24 * HOUR_US
NODE_IDS = tuple(f"node-{number:02}" for number in range(64))
GPUS = 8
# GPUs, milli of each, weight. One whole GPU is a lease of any GPU.
SHAPES = ((1, 1000, 40), (1, 500, 20), (2, 1000, 20), (4, 1000, 12), (8, 1000, 8))
# Hours, weight.
TERMS = (
    (1, 20),
    (2, 12),
    (4, 12),
    (8, 12),
    (12, 10),
    (24, 12),
    (48, 15),
    (72, 11),
    (168, 7),
    (336, 4),
    (720, 3),
)

SMALL = {"a": 4, "b": 4, "c": 1}
# Slots the oracle looks ahead; the last stands for all that follow.
SLOTS = 128
LATEST_START, LONGEST_TERM, LATEST_END = 50, 40, 120


def weighted(rng: random.Random, options: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """One of the options, by the weight that is its last item."""
    return rng.choices(options, [option[-1] for option in options])[0]


def book(calendar: Calendar, booking_id: str, shape: tuple[int, ...], start: int, end: int) -> bool:
    """What the scheduler does to admit a lease: choose a node, then its GPUs."""
    gpu_count, gpu_milli, _ = shape
    node_id = calendar.best_node(NODE_IDS, gpu_count, gpu_milli, start, end)
    if node_id is None:
        return False
    if gpu_count == 1 and gpu_milli == 1000:
        calendar.book_any(booking_id, node_id, start, end)
        return True
    gpus = calendar.pick(node_id, gpu_count, gpu_milli, start, end)
    assert gpus is not None, booking_id
    calendar.book(booking_id, node_id, gpus, gpu_milli, start, end)
    return True


def bench_admissions(leases: int, seed: int) -> None:
    """Book until there are so many leases; print the rate."""
    rng = random.Random(seed)
    calendar = Calendar()
    for node_id in NODE_IDS:
        calendar.set_node(node_id, GPUS)
    wall_s = {True: 0.0, False: 0.0}
    done: Counter[bool] = Counter()
    processor_s = booked_us = 0.0
    while done[True] < leases:
        shape = weighted(rng, SHAPES)
        term_us = weighted(rng, TERMS)[0] * HOUR_US
        start = rng.randrange(0, SPAN_US - term_us, HOUR_US // 4)
        booking_id = f"lease-{done.total()}"
        began, processor = time.perf_counter(), time.thread_time()
        accepted = book(calendar, booking_id, shape, start, start + term_us)
        processor_s += time.thread_time() - processor
        wall_s[accepted] += time.perf_counter() - began
        done[accepted] += 1
        booked_us += accepted * shape[0] * shape[1] / 1000 * term_us
    share = booked_us / (len(NODE_IDS) * GPUS * SPAN_US)
    rate = done.total() / sum(wall_s.values())
    print(
        f"admissions: {done[True]:,} booked, {done[False]:,} refused, {share:.0%} of all GPU time"
        f" sold: {rate:,.0f}/s, {done.total() / processor_s:,.0f} per s of processor time"
    )
    for accepted, word in ((True, "booked"), (False, "refused")):
        if done[accepted]:
            print(f"  {word}: {wall_s[accepted] / done[accepted] * 1e6:.0f} us each")


@dataclass
class Lease:
    """What the oracle remembers of a booking; no GPUs while it waits for any."""

    node_id: str
    gpus: tuple[int, ...]
    milli: int
    start: int
    end: int | None


@dataclass
class Oracle:
    """Milli fixed on every GPU, and bookings that wait, for every slot from ``now`` on."""

    now: int = 0
    fixed: dict[str, npt.NDArray[np.int32]] = field(default_factory=dict)
    waiting: dict[str, npt.NDArray[np.int32]] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node_id, gpu_count in SMALL.items():
            self.fixed[node_id] = np.zeros((gpu_count, SLOTS), np.int32)
            self.waiting[node_id] = np.zeros(SLOTS, np.int32)

    def slots(self, start: int, end: int | None) -> slice:
        """The columns of an interval."""
        return slice(max(0, start - self.now), SLOTS if end is None else max(0, end - self.now))

    def mark(self, lease: Lease, slots: slice, sign: int) -> None:
        """Add or take away a lease in these slots."""
        if not lease.gpus:
            self.waiting[lease.node_id][slots] += sign
        for gpu in lease.gpus:
            self.fixed[lease.node_id][gpu, slots] += sign * lease.milli

    def valid(self, node_id: str) -> bool:
        """No GPU is over its 1000, no slot has more claims than GPUs."""
        fixed = self.fixed[node_id]
        # A GPU is claimed in a slot if anything is fixed on it then or later.
        claimed = np.logical_or.accumulate(fixed[:, ::-1] > 0, axis=1)[:, ::-1]
        claims = claimed.sum(axis=0) + self.waiting[node_id]
        return bool(fixed.max() <= 1000 and claims.max() <= len(fixed))

    def would_do(self, lease: Lease, slots: slice) -> bool:
        """Whether all is still valid with this too."""
        self.mark(lease, slots, 1)
        valid = self.valid(lease.node_id)
        self.mark(lease, slots, -1)
        return valid

    def free_gpus(self, lease: Lease) -> list[int]:
        """GPUs with nothing on them from now on."""
        return [gpu for gpu, row in enumerate(self.fixed[lease.node_id]) if not row.any()]

    def tick(self) -> None:
        """One slot passes; what is over is forgotten."""
        self.now += 1
        for array in (*self.fixed.values(), *self.waiting.values()):
            array[..., :-1] = array[..., 1:]
        ended = [key for key, lease in self.leases.items() if lease.end == self.now]
        for booking_id in ended:
            del self.leases[booking_id]


class Comparison:
    """Random operations on a calendar and the oracle; counts what differs."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.oracle = Oracle()
        self.calendar = Calendar()
        for node_id, gpu_count in SMALL.items():
            self.calendar.set_node(node_id, gpu_count)
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.last_id = 0

    def run(self, operations: int) -> None:
        """Do so many operations; binding and expiring count as well."""
        choices = (self.book, self.book_any, self.extend, self.cut, self.pass_time)
        while self.counts.total() < operations and len(self.errors) < 5:
            self.rng.choices(choices, (30, 25, 15, 12, 18))[0]()

    def done(self, what: str, right: bool, detail: object) -> None:
        """Count an operation, and an error if its outcome was not right."""
        self.counts[what] += 1
        if not right:
            self.errors.append(f"{what} at {self.oracle.now}: {detail}")

    def new_lease(self, any_gpu: bool) -> Lease:
        """A random wish."""
        rng = self.rng
        node_id = rng.choice(list(SMALL))
        start = self.oracle.now + int(LATEST_START * rng.random() ** 2)
        end = start + 1 + int(LONGEST_TERM * rng.random() ** 3) if rng.random() < 0.99 else None
        if any_gpu:
            return Lease(node_id, (), 1000, start, end)
        count = rng.randint(1, SMALL[node_id])
        gpus = tuple(rng.sample(range(SMALL[node_id]), min(count, rng.randint(1, 4))))
        return Lease(node_id, gpus, rng.choice((200, 500, 700, 1000)), start, end)

    def keep(self, lease: Lease) -> None:
        """It was accepted: the oracle takes it over and must still be valid."""
        self.oracle.mark(lease, self.oracle.slots(lease.start, lease.end), 1)
        self.oracle.leases[f"x{self.last_id}"] = lease
        if not self.oracle.valid(lease.node_id):
            self.errors.append(f"oversubscribed at {self.oracle.now}: {lease}")

    def book(self) -> None:
        """Exact GPUs: refused exactly if the oracle says so."""
        lease = self.new_lease(any_gpu=False)
        fits = self.oracle.would_do(lease, self.oracle.slots(lease.start, lease.end))
        self.last_id += 1
        try:
            self.calendar.book(
                f"x{self.last_id}", lease.node_id, lease.gpus, lease.milli, lease.start, lease.end
            )
        except Oversubscribed:
            self.done("book refused", not fits, lease)
            return
        self.done("book", fits, lease)
        self.keep(lease)

    def book_any(self) -> None:
        """Any GPU: waits if it may; else takes a gap at once; else it is refused."""
        lease = self.new_lease(any_gpu=True)
        slots = self.oracle.slots(lease.start, lease.end)
        gpu_count = SMALL[lease.node_id]
        waits = gpu_count > 1 and self.oracle.would_do(lease, slots)
        gaps = [Lease(lease.node_id, (g,), 1000, lease.start, lease.end) for g in range(gpu_count)]
        self.last_id += 1
        try:
            gpu = self.calendar.book_any(f"x{self.last_id}", lease.node_id, lease.start, lease.end)
        except Oversubscribed:
            fits = waits or any(self.oracle.would_do(gap, slots) for gap in gaps)
            self.done("book_any refused", not fits, lease)
            return
        if gpu is None:
            self.done("book_any", waits, lease)
            self.keep(lease)
        else:
            self.done(
                "book_any in a gap", not waits and self.oracle.would_do(gaps[gpu], slots), gpu
            )
            self.keep(gaps[gpu])
            return
        if lease.start == self.oracle.now:
            self.bind(f"x{self.last_id}", lease)

    def extend(self) -> None:
        """Refused exactly if the oracle says so."""
        if not self.oracle.leases:
            return
        booking_id, lease = self.rng.choice(list(self.oracle.leases.items()))
        if lease.end is None:
            return
        end = min(lease.end + self.rng.randint(1, 20), self.oracle.now + LATEST_END)
        more = self.oracle.slots(lease.end, end)
        fits = self.oracle.would_do(lease, more)
        try:
            self.calendar.extend(booking_id, end)
        except Oversubscribed:
            self.done("extend refused", not fits, lease)
            return
        self.done("extend", fits, lease)
        self.oracle.mark(lease, more, 1)
        lease.end = end
        if not self.oracle.valid(lease.node_id):
            self.errors.append(f"oversubscribed at {self.oracle.now}: {lease}")

    def cut(self) -> None:
        """Release early, or cancel."""
        if not self.oracle.leases:
            return
        booking_id, lease = self.rng.choice(list(self.oracle.leases.items()))
        until = lease.end or self.oracle.now + LATEST_END
        at = self.rng.randint(self.oracle.now, max(self.oracle.now, until - 1))
        self.calendar.cut(booking_id, at)
        self.oracle.mark(lease, self.oracle.slots(max(at, lease.start), lease.end), -1)
        lease.end = at
        if at <= max(lease.start, self.oracle.now):
            del self.oracle.leases[booking_id]
        self.done("cut", True, lease)

    def pass_time(self) -> None:
        """The next slot begins: expire what is over, bind what starts, compare what is free."""
        self.oracle.tick()
        self.calendar.expire(self.oracle.now)
        self.done("expire", True, None)
        for booking_id, lease in self.oracle.leases.items():
            if not lease.gpus and lease.start == self.oracle.now:
                self.bind(booking_id, lease)
        end = self.oracle.now + self.rng.randint(1, LATEST_END)
        for node_id, fixed in self.oracle.fixed.items():
            free = 1000 - fixed[:, self.oracle.slots(self.oracle.now, end)].max(axis=1)
            room = self.calendar.room(node_id, self.oracle.now, end)
            if any(shown not in (0, left) for shown, left in zip(room, free, strict=True)):
                self.errors.append(f"room of {node_id} at {self.oracle.now}: {room}, not {free}")

    def bind(self, booking_id: str, lease: Lease) -> None:
        """At its start there is a GPU, wholly free from now on: the lowest one is taken."""
        free = self.oracle.free_gpus(lease)
        try:
            gpu = self.calendar.bind(booking_id)
        except ValueError as failed:
            self.done("bind", False, failed)
            return
        self.done("bind", gpu == min(free, default=None), f"{lease} to {gpu}, free are {free}")
        slots = self.oracle.slots(lease.start, lease.end)
        self.oracle.mark(lease, slots, -1)
        lease.gpus = (gpu,)
        self.oracle.mark(lease, slots, 1)
        if not self.oracle.valid(lease.node_id):
            self.errors.append(f"oversubscribed at {self.oracle.now}: {lease}")


def run(leases: int = 20_000, operations: int = 1_000_000, seed: int = 1) -> None:
    """Measure, then compare. Raises SystemExit(1) if any answer was wrong."""
    bench_admissions(leases, seed)
    comparison = Comparison(seed)
    began = time.perf_counter()
    comparison.run(operations)
    seconds = time.perf_counter() - began
    print(f"operations: {comparison.counts.total():,} in {seconds:.0f} s, of which")
    for what, count in sorted(comparison.counts.items()):
        print(f"  {count:>9,} {what}")
    for error in comparison.errors:
        print(f"wrong: {error}")
    if comparison.errors:
        raise SystemExit(1)
    print("0 errors")


def main() -> None:
    """Run what is asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--leases", type=int, default=20_000)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    run(arguments.leases, arguments.operations, arguments.seed)


if __name__ == "__main__":
    main()
