"""How many replicas a pool should have. Pure: a snapshot in, a decision with its reason out.

Up at once, down late. A pool needs as many replicas as the largest of these says: requests that run
or wait against places; requests that wait against the rate at which others finish; the work it is
given, and what is asked for in slices, against what a replica has been seen to do; the KV cache in
use; what is usual at this time of day (forecast.py). It shrinks to the most that it needed within
the last while (stabilisation as in Kubernetes' horizontal autoscaler), so a load that comes and
goes does not make it flap; it falls to zero when holding an idle replica has cost as much as waking
it would (the ski-rental rule: at most twice the cost of knowing the future; Karlin et al., 1988).
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from market.types import Bounds

# Of a pool's places, so many may be in use before another replica is worth its start.
PLACES_USED = 0.8
WHOLE_MILLI = 1000
# Of a replica's KV cache and of its known speed, so much may be in use.
KV_USED = 0.8
WORK_USED = 0.8
# What a full pool does is known after so long: rates are means over a while.
FULL_S = 15.0
# A signal about one replica's limits asks for at most so many times as many.
GROWTH_MAX = 2.0
# Whoever waits is to be served within this time.
WAIT_S = 5.0
STABLE_S = 120.0
STABLE_STARTS = 3.0
KEEP_ALIVE_MIN_S = 30.0
KEEP_ALIVE_MAX_S = 3600.0
# Where an idle replica costs nobody anything.
KEEP_ALIVE_FREE_S = 300.0
# What the host's memory for a replica that sleeps is worth, of what its GPUs are; and how long one
# sleeps at most.
ASLEEP_PRICE = 0.05
ASLEEP_MAX_S = 86_400.0
# What the market takes an hour of a user's waiting to be worth, in the currency (pico units).
WAITING_HOUR_PICO = 10 * 10**12


class Signal(StrEnum):
    """What a decision follows."""

    BOUNDS = "bounds"
    REQUESTS = "requests"
    BACKLOG = "backlog"
    WORK = "work"
    SLICES = "slices"
    KV = "kv"
    FORECAST = "forecast"
    BUDGET = "budget"
    IDLE = "idle"
    STEADY = "steady"


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of a pool right now, over all gateways.

    ``cold``: requests for which no replica is there. ``finished_per_s``: requests. Work is in
    weighted tokens (fairness.py) a second: ``work`` was done, ``asked`` is what slices were asked
    for. ``kv_used`` is of all serving replicas' KV cache, in [0, 1].
    """

    running: int = 0
    waiting: int = 0
    cold: int = 0
    finished_per_s: float = 0.0
    work_per_s: float = 0.0
    asked_per_s: float = 0.0
    kv_used: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether nobody asks for anything."""
        return not (self.running or self.waiting or self.cold)


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one replica: what an hour of its GPUs is offered for, and how long it takes to start.

    ``wake_s``: to wake it, if it sleeps when it goes.
    """

    hour_pico: int
    start_s: float
    wake_s: float | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A pool as it is: ``replicas`` that serve or start, of them ``serving``, with ``places`` each.

    An hour of each costs ``hours_pico``, and of the next ``next_pico``; None if it has no place.
    ``speed`` is the most work a second that one of them was seen to do; 0 while unknown.
    The time of day asks for ``ahead``, and stretches the keep-alive by ``stretch``. ``peak``: the
    most that was needed within ``stable_s``; ``idle_s``: for how long nobody has asked for
    anything.
    """

    bounds: Bounds
    costs: Costs
    demand: Demand
    places: int
    replicas: int
    serving: int
    hours_pico: tuple[int, ...] = ()
    next_pico: int | None = None
    speed: float = 0.0
    ahead: int = 0
    stretch: float = 1.0
    peak: int = 0
    idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there should be, and why in words."""

    replicas: int
    signal: Signal
    reason: str


def needed(pool: Snapshot) -> Decision:
    """What the demand alone asks for, whatever is allowed."""
    demand, now = pool.demand, max(1, pool.serving)
    asked = demand.running + demand.waiting + demand.cold
    found = [
        Decision(
            math.ceil(asked / (pool.places * PLACES_USED)),
            Signal.REQUESTS,
            f"{asked} request(s) for {pool.places} places a replica",
        )
    ]
    # Only what a full pool gets done says how much a replica can do.
    if demand.waiting and demand.finished_per_s > 0:
        wait_s = demand.waiting / demand.finished_per_s
        if wait_s > WAIT_S:
            # Twice as many at most: what the rate will be then is not known before they serve.
            more = min(2.0, wait_s / WAIT_S)
            reason = f"the queue is {wait_s:.0f} s long"
            found.append(Decision(math.ceil(now * more), Signal.BACKLOG, reason))
    if pool.serving and not demand.idle:  # rates fade, but never to nothing
        found += _limits(pool)
    found.append(Decision(pool.ahead, Signal.FORECAST, "usual at this time of day"))
    return max(found, key=lambda decision: decision.replicas)


def _limits(pool: Snapshot) -> list[Decision]:
    """What one replica's limits ask for, so that those that serve are not close to them."""
    demand = pool.demand
    limits = [(Signal.KV, demand.kv_used / KV_USED, f"{demand.kv_used:.0%} of the KV cache")]
    if pool.speed > 0:
        capacity = pool.speed * pool.serving * WORK_USED
        does = f"of {pool.speed * pool.serving:.0f} weighted tokens/s"
        limits += [
            (Signal.WORK, demand.work_per_s / capacity, f"{demand.work_per_s:.0f} {does}"),
            (
                Signal.SLICES,
                demand.asked_per_s / capacity,
                f"{demand.asked_per_s:.0f} asked {does}",
            ),
        ]
    return [
        Decision(math.ceil(pool.serving * min(GROWTH_MAX, share)), signal, reason)
        for signal, share, reason in limits
    ]


def decide(pool: Snapshot) -> Decision:
    """How many replicas the pool should have now.

    Never less than the minimum, never more than the maximum or than the budget pays for, though the
    minimum comes before the budget.
    """
    wanted = needed(pool)
    if wanted.replicas < pool.replicas:
        wanted = _shrunk(pool, wanted)
    least, most = pool.bounds.minimum, pool.bounds.maximum
    bound = min(max(wanted.replicas, least), most)
    if bound != wanted.replicas:
        wanted = Decision(bound, Signal.BOUNDS, f"{wanted.reason}; bounds are {least}:{most}")
    paid = _paid_for(pool)
    if paid is not None and wanted.replicas > max(paid, least):
        reason = f"{wanted.reason}; its GPU budget pays for {paid}"
        wanted = Decision(max(paid, least), Signal.BUDGET, reason)
    return wanted


class Memory:
    """What a pool needed lately, and since when it is idle. One that is lost begins anew: what is
    there then is kept for a while.
    """

    def __init__(self, now_s: float) -> None:
        self._needed: deque[tuple[float, int]] = deque()  # in the order of time
        self.used_s = now_s
        self.speed = 0.0
        self._full_since_s: float | None = None
        self.decision: Decision | None = None

    def decide(self, pool: Snapshot, now_s: float) -> Decision:
        """``decide`` for the pool as it is now; its ``peak`` and ``idle_s`` are filled in here."""
        if not pool.demand.idle:
            self.used_s = now_s
        self._learn(pool, now_s)
        if not self._needed:
            self._needed.append((now_s, pool.replicas))
        self._needed.append((now_s, needed(pool).replicas))
        while self._needed[0][0] < now_s - stable_s(pool.costs):
            self._needed.popleft()
        peak = max(count for _, count in self._needed)
        self.decision = decide(replace(pool, peak=peak, idle_s=now_s - self.used_s))
        return self.decision

    def _learn(self, pool: Snapshot, now_s: float) -> None:
        """What a replica can do is seen first in a pool that was full for a while; then whatever is
        more than that.
        """
        if not (pool.serving and pool.demand.waiting):
            self._full_since_s = None
        elif self._full_since_s is None:
            self._full_since_s = now_s
        full = self._full_since_s is not None and now_s - self._full_since_s >= FULL_S
        if pool.serving and (full or self.speed):
            self.speed = max(self.speed, pool.demand.work_per_s / pool.serving)


def stable_s(costs: Costs) -> float:
    """For how long a pool keeps what it needed: no shorter than a few starts take."""
    return max(STABLE_S, STABLE_STARTS * costs.start_s)


def keep_alive_s(bounds: Bounds, costs: Costs, stretch: float = 1.0) -> float:
    """For how long an idle pool keeps its last replicas.

    Break-even: the GPU's time of one start and what those who wait for it lose, over what holding
    costs a second; ``stretch`` times that by a forecast. What the operator says is not stretched.
    """
    if bounds.keep_alive_s is not None:
        return bounds.keep_alive_s
    if costs.hour_pico == 0:
        return KEEP_ALIVE_FREE_S
    back_s = costs.start_s if costs.wake_s is None else costs.wake_s
    even_s = back_s * (1 + WAITING_HOUR_PICO / costs.hour_pico)
    return min(max(stretch * even_s, KEEP_ALIVE_MIN_S), KEEP_ALIVE_MAX_S)


def keep_asleep_s(costs: Costs) -> float:
    """For how long a replica sleeps before it is given up: break-even at the price of the host's
    memory, of what a start costs more than waking.
    """
    hour_pico = costs.hour_pico * ASLEEP_PRICE
    saved_s = max(0.0, costs.start_s - (costs.wake_s or 0.0))
    if hour_pico == 0:
        return ASLEEP_MAX_S
    even_s = saved_s * (costs.hour_pico + WAITING_HOUR_PICO) / hour_pico
    return min(max(even_s, KEEP_ALIVE_MIN_S), ASLEEP_MAX_S)


@dataclass(frozen=True, slots=True)
class Busy:
    """A replica, what an hour of it costs, and the answers under way on it.

    ``created`` in seconds of any clock.
    """

    replica_id: str
    streams: int
    serves: bool
    created: float
    hour_pico: int = 0


def to_drain(replicas: Iterable[Busy], count: int, *, dearest: bool = False) -> list[str]:
    """Which replicas go: those that do not serve yet, then the emptiest, then the newest.

    The ``dearest`` come first where it is about money.
    """
    order = sorted(
        replicas,
        key=lambda r: (-r.hour_pico * dearest, r.serves, r.streams, -r.created, r.replica_id),
    )
    return [replica.replica_id for replica in order[:count]]


@dataclass(frozen=True, slots=True)
class Idler:
    """An idle replica in whose place another pool's may go: ``milli`` of the GPU ``place``.

    ``back_s``: how long it takes to have it back.
    """

    replica_id: str
    place: str
    milli: int
    idle_s: float
    back_s: float = 1.0

    @property
    def worth(self) -> float:
        """What is idle for long is least likely to be asked soon (least recently used)."""
        return self.back_s / (1 + self.idle_s)


def to_evict(idlers: Iterable[Idler], missing_milli: Mapping[str, int]) -> list[str]:
    """The idle replicas that must go so that another fits some GPU; [] if none do.

    ``missing_milli``: how much more would have to be free there, by place. Of the places where it
    can fit, the one whose idle replicas are worth least.
    """
    by_place: dict[str, list[Idler]] = {}
    for idler in idlers:
        by_place.setdefault(idler.place, []).append(idler)
    best: tuple[float, list[str]] | None = None
    for place, missing in sorted(missing_milli.items()):
        gone: list[Idler] = []
        for idler in sorted(by_place.get(place, ()), key=lambda i: (i.worth, i.replica_id)):
            if sum(other.milli for other in gone) < missing:
                gone.append(idler)
        worth = sum(idler.worth for idler in gone)
        enough = gone and sum(idler.milli for idler in gone) >= missing
        if enough and (best is None or worth < best[0]):
            best = (worth, [idler.replica_id for idler in gone])
    return best[1] if best is not None else []


def _shrunk(pool: Snapshot, wanted: Decision) -> Decision:
    """Less is needed than there is: but only what was not needed for a while goes."""
    if pool.demand.idle:
        limit_s = keep_alive_s(pool.bounds, pool.costs, pool.stretch)
        if pool.idle_s >= limit_s:
            return (
                wanted if pool.ahead else Decision(0, Signal.IDLE, f"idle for {pool.idle_s:.0f} s")
            )
        kept = min(pool.replicas, max(1, pool.peak))
        return Decision(kept, Signal.STEADY, f"idle, kept for {limit_s:.0f} s")
    kept = min(pool.replicas, max(wanted.replicas, pool.peak, 1))
    if kept > wanted.replicas:
        return Decision(kept, Signal.STEADY, f"{kept} needed within {stable_s(pool.costs):.0f} s")
    return wanted


def _paid_for(pool: Snapshot) -> int | None:
    """For how many the budget is enough: the cheapest of those that are there, then more."""
    if pool.bounds.spend_max_pico is None:
        return None
    left_pico = pool.bounds.spend_max_pico
    for count, hour_pico in enumerate(sorted(pool.hours_pico)):
        left_pico -= hour_pico
        if left_pico < 0:
            return count
    if not pool.next_pico:
        return None
    return len(pool.hours_pico) + left_pico // pool.next_pico
