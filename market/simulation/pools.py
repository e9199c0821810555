"""One pool's day: arrivals in, the autoscaler's own decisions, virtual replicas.

The decisions are autoscaling.py's, taken as often as the scheduler takes them while anything
happens. A virtual replica has places; an answer holds one for its prompt and its tokens. Pools do
not take GPUs from each other here: what a cluster of limited size does is not simulated.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from market.autoscaling import Costs, Demand, Memory, Snapshot, keep_alive_s
from market.forecast import BUCKET_S, History, replicas_ahead, stretch
from market.types import Bounds

ROUND_S = 0.5
# Between rounds in which nothing can change but time.
SLOW_ROUND_S = 2.0
# A pool with a history that rests looks so often whether what it waits for is given up.
LOOK_S = 5.0
EPSILON_S = 0.001
RATE_TAU_S = 10.0


@dataclass(frozen=True, slots=True)
class Machine:
    """A virtual replica: its places, speeds (tokens a second) and time to start."""

    places: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    start_s: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when, and how long its prompt and answer are."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Outcome:
    """What came of a pool's day. ``ttft_s`` are per request, in the order of their begin."""

    replica_s: float = 0.0
    starts: int = 0
    peak: int = 0
    ttft_s: list[float] = field(default_factory=list)


class _Pool:
    def __init__(
        self, machine: Machine, bounds: Bounds, hour_pico: int, history: History | None
    ) -> None:
        self.machine = machine
        self.history = history
        self.bounds = bounds
        self.costs = Costs(hour_pico, machine.start_s)
        self.memory = Memory(0.0)
        self.outcome = Outcome()
        self.ends: list[float] = []
        self.readies: deque[float] = deque()
        self.waiting: deque[Arrival] = deque()
        self.running = self.serving = self.starting = 0
        self.finished: deque[float] = deque()
        self.last_s = 0.0

    def grow(self, count: int, now_s: float) -> None:
        for _ in range(count):
            self.starting += 1
            self.outcome.starts += 1
            self.readies.append(now_s + self.machine.start_s)
        self.outcome.peak = max(self.outcome.peak, self.serving + self.starting)

    def pass_to(self, now_s: float) -> None:
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
            self.serving = max(pinned, min(self.serving, wanted - self.starting), 0)

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
        rests = not (self.waiting or self.running or self.starting)
        if self.history is not None and rests:
            # Just after the moment from which on the next ten minutes are looked at.
            start_s = self.machine.start_s
            begins_s = ((now_s + start_s) // BUCKET_S + 1) * BUCKET_S - start_s + EPSILON_S
            return min(begins_s, now_s + LOOK_S) if self.serving else begins_s
        if self.waiting or self.running or self.starting:
            return now_s + (ROUND_S if self.waiting else SLOW_ROUND_S)
        if self.serving > self.bounds.minimum:
            ends_s = self.memory.used_s + keep_alive_s(self.bounds, self.costs)
            return max(now_s + ROUND_S, min(now_s + SLOW_ROUND_S, ends_s))
        return None


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
    pool = _Pool(machine, bounds, hour_pico, history)
    pool.serving = pool.outcome.peak = bounds.minimum
    coming = deque(arrivals)
    round_s: float | None = 0.0
    while True:
        times = [pool.ends[0]] if pool.ends else []
        times += [pool.readies[0]] if pool.readies else []
        times += [coming[0].at_s] if coming else []
        times += [round_s] if round_s is not None else []
        now_s = min(times, default=until_s)
        if now_s >= until_s:
            pool.pass_to(until_s)
            return pool.outcome
        pool.pass_to(now_s)
        while pool.ends and pool.ends[0] <= now_s:
            heapq.heappop(pool.ends)
            pool.running -= 1
            pool.finished.append(now_s)
        while pool.readies and pool.readies[0] <= now_s:
            pool.readies.popleft()
            pool.starting -= 1
            pool.serving += 1
        arrived = False
        while coming and coming[0].at_s <= now_s:
            pool.waiting.append(coming.popleft())
            arrived = True
        pool.begin(now_s)
        # Whoever comes to a cold pool makes the scheduler hurry; all else waits for its round.
        if (round_s is not None and round_s <= now_s) or (arrived and pool.waiting):
            pool.decide(now_s)
            round_s = pool.next_round_s(now_s)
        else:
            later_s = pool.next_round_s(now_s)
            if later_s is not None and (round_s is None or later_s < round_s):
                round_s = later_s
