"""Pools' days: arrivals in, the autoscaler's own decisions, virtual replicas.

The decisions are autoscaling.py's, taken as often as the scheduler takes them while anything
happens. A virtual replica has places; an answer holds one for its prompt and its tokens. A pool is
alone and has all the GPUs that it wants, or many share so many and put each other's idle replicas
out. Nobody gives up waiting.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from market.autoscaling import (
    PLACES_USED,
    WHOLE_MILLI,
    Costs,
    Demand,
    Idler,
    Memory,
    Snapshot,
    keep_alive_s,
    to_evict,
)
from market.forecast import BUCKET_S, History, replicas_ahead, stretch
from market.types import Bounds

ROUND_S = 0.5
# Between rounds in which nothing can be wanted but less.
SLOW_ROUND_S = 2.0
# A pool with a history that rests looks so often whether what it waits for is given up.
LOOK_S = 5.0
# Idle for so long, a replica may be put out (the scheduler's own).
EVICT_AFTER_S = 3.0
EPSILON_S = 0.001
RATE_TAU_S = 10.0


@dataclass(frozen=True, slots=True)
class Machine:
    """A virtual replica: its places, speeds (tokens a second) and time to start."""

    places: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    start_s: float

    def part(self, share: float) -> "Machine":
        """What so much of its GPU serves: places and prompts by the share; one answer is as fast,
        because fewer are under way at a time.
        """
        places = max(1, round(self.places * share))
        return replace(self, places=places, prompt_tokens_per_s=self.prompt_tokens_per_s * share)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when, and how long its prompt and answer are."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Outcome:
    """What came of a pool's day. ``ttft_s`` are per request, in the order of their begin.

    ``evicted``: replicas of other pools that its own were started in place of.
    """

    replica_s: float = 0.0
    starts: int = 0
    peak: int = 0
    evicted: int = 0
    ttft_s: list[float] = field(default_factory=list)


class Gpus:
    """So many GPUs that pools share, ``milli`` of one for each replica.

    Where another must go first, a start takes ``switch_s`` longer.
    """

    def __init__(self, count: int, milli: int, switch_s: float) -> None:
        self._milli = milli
        self._switch_s = switch_s
        self._free_milli = {f"gpu-{n}": WHOLE_MILLI for n in range(count)}
        self._names = (str(n) for n in itertools.count())
        self._held: dict[str, tuple[_Pool, str]] = {}

    def take(self, pool: "_Pool", now_s: float) -> float | None:
        """A place for one more; how much longer its start takes there, None if there is none."""
        late_s = 0.0
        place = self._place()
        if place is None:
            missing = {place: self._milli - free for place, free in self._free_milli.items()}
            gone = to_evict(self._idlers(pool, now_s), missing)
            for name in gone:
                loser = self._held[name][0]
                loser.pass_to(now_s)
                loser.serving -= 1
                self._release(name)
            pool.outcome.evicted += len(gone)
            late_s, place = self._switch_s, self._place()
        if place is None:
            return None
        self._free_milli[place] -= self._milli
        self._held[next(self._names)] = pool, place
        return late_s

    def give_back(self, pool: "_Pool", count: int) -> None:
        """So many of the pool's places, the newest."""
        mine = [name for name, (holder, _) in self._held.items() if holder is pool]
        for name in mine[len(mine) - count :]:
            self._release(name)

    def _release(self, name: str) -> None:
        _, place = self._held.pop(name)
        self._free_milli[place] += self._milli

    def _place(self) -> str | None:
        return next((p for p, free in self._free_milli.items() if free >= self._milli), None)

    def _idlers(self, growing: "_Pool", now_s: float) -> Iterator[Idler]:
        """Replicas of other pools that serve nobody and are more than their pool's minimum."""
        spare: dict[_Pool, int] = {}
        for name, (pool, place) in self._held.items():
            if pool is growing or pool.idle_s(now_s) < EVICT_AFTER_S:
                continue
            left = spare.setdefault(pool, pool.serving - pool.bounds.minimum)
            if left > 0:
                spare[pool] -= 1
                yield Idler(name, place, self._milli, pool.idle_s(now_s), pool.costs.start_s)


class _Pool:
    def __init__(
        self,
        arrivals: Sequence[Arrival],
        machine: Machine,
        bounds: Bounds,
        hour_pico: int,
        history: History | None = None,
        gpus: Gpus | None = None,
    ) -> None:
        self.coming = deque(arrivals)
        self.round_s: float | None = 0.0
        self.gpus = gpus
        self.machine = machine
        self.history = history
        self.bounds = bounds
        self.costs = Costs(hour_pico, machine.start_s)
        self.memory = Memory(0.0)
        self.outcome = Outcome()
        self.ends: list[float] = []
        self.readies: list[float] = []
        self.waiting: deque[Arrival] = deque()
        self.running = self.serving = self.starting = 0
        self.finished: deque[float] = deque()
        self.last_s = 0.0

    def grow(self, count: int, now_s: float) -> None:
        for _ in range(count):
            late_s = 0.0 if self.gpus is None else self.gpus.take(self, now_s)
            if late_s is None:
                break
            self.starting += 1
            self.outcome.starts += 1
            heapq.heappush(self.readies, now_s + self.machine.start_s + late_s)
        self.outcome.peak = max(self.outcome.peak, self.serving + self.starting)

    def idle_s(self, now_s: float) -> float:
        return 0.0 if self.running or self.waiting else now_s - self.memory.used_s

    def pass_to(self, now_s: float) -> None:
        if self.running or self.waiting:
            # What comes and ends between two looks of the scheduler is not seen.
            looked_s = now_s // ROUND_S * ROUND_S
            if looked_s > self.last_s:
                self.memory.used_s = max(self.memory.used_s, looked_s)
        self.outcome.replica_s += (self.serving + self.starting) * (now_s - self.last_s)
        self.last_s = now_s

    def begin(self, now_s: float) -> None:
        machine = self.machine
        while self.waiting and self.running < self.serving * machine.places:
            request = self.waiting.popleft()
            self.running += 1
            prefill_s = request.prompt_tokens / machine.prompt_tokens_per_s
            ends_s = now_s + prefill_s + request.output_tokens / machine.output_tokens_per_s
            self.outcome.ttft_s.append(now_s + prefill_s - request.at_s)
            heapq.heappush(self.ends, ends_s)

    def decide(self, now_s: float) -> None:
        while self.finished and self.finished[0] < now_s - RATE_TAU_S:
            self.finished.popleft()
        is_cold = self.serving == 0
        demand = Demand(
            running=self.running,
            waiting=0 if is_cold else len(self.waiting),
            cold=len(self.waiting) if is_cold else 0,
            finished_per_s=len(self.finished) / RATE_TAU_S,
        )
        there = self.serving + self.starting
        pool = Snapshot(
            self.bounds,
            self.costs,
            demand,
            self.machine.places,
            there,
            self.serving,
            ahead=self.ahead(now_s, demand.idle, there > 0),
            stretch=self.stretch(now_s),
        )
        wanted = self.memory.decide(pool, now_s).replicas
        if wanted > there:
            self.grow(wanted - there, now_s)
        elif wanted < there:
            # Streams pin replicas: as many stay as the running ones fill.
            pinned = -(-self.running // self.machine.places)
            kept = max(pinned, min(self.serving, wanted - self.starting), 0)
            if self.gpus is not None:
                self.gpus.give_back(self, self.serving - kept)
            self.serving = kept

    def ahead(self, now_s: float, idle: bool, is_there: bool) -> int:
        if self.history is None:
            return 0
        idle_s = now_s - self.memory.used_s if idle else 0.0
        places = self.machine.places
        return replicas_ahead(self.history, now_s, idle_s, self.costs, places, is_there=is_there)

    def stretch(self, now_s: float) -> float:
        if self.history is None:
            return 1.0
        return stretch(self.history, now_s, keep_alive_s(self.bounds, self.costs))

    def next_round_s(self, now_s: float) -> float | None:
        """When to look again; None if only an arrival can change anything."""
        if self.serving == self.bounds.minimum == self.bounds.maximum:
            return None
        rests = not (self.waiting or self.running or self.starting)
        if self.history is not None and rests:
            # Just after the moment from which on the next ten minutes are looked at.
            start_s = self.machine.start_s
            begins_s = ((now_s + start_s) // BUCKET_S + 1) * BUCKET_S - start_s + EPSILON_S
            return min(begins_s, now_s + LOOK_S) if self.serving else begins_s
        there = self.serving + self.starting
        full = self.running > there * self.machine.places * PLACES_USED
        if self.waiting or (full and there < self.bounds.maximum):
            return now_s + ROUND_S
        least = max(1, self.bounds.minimum)
        if self.running or self.starting:
            # With its least and room for more, nothing can change until somebody comes.
            return now_s + SLOW_ROUND_S if there > least or self.starting else None
        if self.serving > self.bounds.minimum:
            ends_s = self.memory.used_s + keep_alive_s(self.bounds, self.costs)
            soon_s = min(now_s + SLOW_ROUND_S, ends_s) if self.serving > least else ends_s
            return max(now_s + ROUND_S, soon_s)
        return None

    def next_s(self) -> float:
        """When something happens next."""
        times = [self.ends[0]] if self.ends else []
        times += [self.readies[0]] if self.readies else []
        times += [self.coming[0].at_s] if self.coming else []
        times += [self.round_s] if self.round_s is not None else []
        return min(times, default=math.inf)

    def step(self, now_s: float) -> None:
        """All that happens at that moment."""
        self.pass_to(now_s)
        while self.ends and self.ends[0] <= now_s:
            heapq.heappop(self.ends)
            self.running -= 1
            self.finished.append(now_s)
        while self.readies and self.readies[0] <= now_s:
            heapq.heappop(self.readies)
            self.starting -= 1
            self.serving += 1
        arrived = False
        while self.coming and self.coming[0].at_s <= now_s:
            self.waiting.append(self.coming.popleft())
            arrived = True
        self.begin(now_s)
        # Whoever comes to a cold pool makes the scheduler hurry; all else waits for its round.
        if (self.round_s is not None and self.round_s <= now_s) or (arrived and self.waiting):
            self.decide(now_s)
            self.round_s = self.next_round_s(now_s)
        else:
            later_s = self.next_round_s(now_s)
            if later_s is not None and (self.round_s is None or later_s < self.round_s):
                self.round_s = later_s


def simulate(
    arrivals: Sequence[Arrival],
    machine: Machine,
    bounds: Bounds,
    hour_pico: int,
    until_s: float,
    history: History | None = None,
) -> Outcome:
    """A pool's time from 0 to ``until_s``; it begins with its minimum, and that has started.

    ``hour_pico`` is what an hour of one replica costs. With a ``history``, whose bucket 0 begins at
    0, replicas are started ahead of what is usual.
    """
    pool = _Pool(arrivals, machine, bounds, hour_pico, history)
    pool.serving = pool.outcome.peak = bounds.minimum
    while (now_s := pool.next_s()) < until_s:
        pool.step(now_s)
    pool.pass_to(until_s)
    return pool.outcome


def simulate_shared(
    days: Sequence[Sequence[Arrival]],
    machine: Machine,
    bounds: Bounds,
    hour_pico: int,
    until_s: float,
    gpus: Gpus,
) -> list[Outcome]:
    """Many pools' time on the same GPUs; all begin with no replica."""
    pools = [_Pool(arrivals, machine, bounds, hour_pico, gpus=gpus) for arrivals in days]
    order = [(pool.next_s(), number) for number, pool in enumerate(pools)]
    heapq.heapify(order)
    while order and order[0][0] < until_s:
        now_s, number = order[0]
        pools[number].step(now_s)
        heapq.heapreplace(order, (pools[number].next_s(), number))
    for pool in pools:
        pool.pass_to(until_s)
    return [pool.outcome for pool in pools]
