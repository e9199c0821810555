"""Whom next: fair shares of a pool by virtual token counters. Pure.

Every tenant has a counter of the work it was given, divided by its weight; whoever is backlogged
and has the smallest counter is next. This is VTC (Sheng et al., Fairness in Serving Large Language
Models, OSDI'24) with its full lift rule, weights, and several gateways: each has its own queues,
the scheduler merges their counters and deals out the places of the pool.

Work is counted in weighted tokens: input that was not cached 1, cached input 0.1, output 2. Between
two tenants that are backlogged all the time, weighted service differs by at most
``2 * max(w_in * L, w_out * M) / min(weight)`` (L: longest input, M: output tokens that can be under
way), plus what was served between two merges.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

INPUT_WORK = 1.0
CACHED_WORK = 0.1
OUTPUT_WORK = 2.0
# How much work per weight a tenant that was away may have ahead of the others on spare places.
BURST_WORK = 1024.0


def spare(places: int) -> int:
    """Places beside those of a pool, for tenants below their share: square-root staffing."""
    return math.isqrt(places)


def input_work(input_tokens: int, cached_tokens: int = 0) -> float:
    """Work of a prompt, in weighted tokens."""
    return INPUT_WORK * (input_tokens - cached_tokens) + CACHED_WORK * cached_tokens


class VirtualCounters:
    """Work given to each tenant divided by its weight, and who is backlogged."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._lifted: dict[str, float] = {}
        self._active: set[str] = set()
        self._last_left: str | None = None

    def get(self, tenant: str) -> float:
        """A tenant's counter; for one that was never seen, where it would begin."""
        found = self._counters.get(tenant)
        return self._floor() if found is None else found

    @property
    def active(self) -> frozenset[str]:
        """Tenants that wait and could be served."""
        return frozenset(self._active)

    def enter(self, tenant: str) -> None:
        """The tenant is backlogged from now on.

        Its counter is lifted to the smallest of those that are: being away earns nothing. Where
        nobody is, to that of the tenant which left last.
        """
        if tenant in self._active:
            return
        before = self._counters.get(tenant, 0.0)
        self._counters[tenant] = max(before, self._floor())
        lifted = self._lifted.get(tenant, 0.0) + self._counters[tenant] - before
        self._lifted[tenant] = min(BURST_WORK, lifted)
        self._active.add(tenant)

    def leave(self, tenant: str) -> None:
        """The tenant waits no more, or a limit of its own keeps it from being served."""
        if tenant in self._active:
            self._active.discard(tenant)
            self._last_left = tenant

    def charge(self, tenant: str, work: float, weight: int) -> None:
        """Work was given to a tenant."""
        self._counters[tenant] = self.get(tenant) + work / weight

    def set(self, tenant: str, counter: float) -> None:
        """Take over a counter from whoever has seen more."""
        self._counters[tenant] = counter

    def first(self, tenants: Iterable[str]) -> str | None:
        """Who of these has the smallest counter; by name where they are equal."""
        return min(tenants, key=lambda name: (self.get(name), name), default=None)

    def first_below_share(self, tenants: Iterable[str]) -> str | None:
        """Who of these is furthest below its share, if any is.

        So far is a tenant that it would have its smallest counter of all were it not for what it
        was lifted by, at most ``BURST_WORK``.
        """

        def unlifted(tenant: str) -> float:
            return self.get(tenant) - self._lifted.get(tenant, 0.0)

        found = min(tenants, key=lambda name: (unlifted(name), name), default=None)
        return found if found is not None and unlifted(found) < self._floor() else None

    def snapshot(self) -> dict[str, float]:
        """All counters."""
        return dict(self._counters)

    def forget(self, keep: Collection[str]) -> None:
        """Drop tenants so far behind that they will be lifted just as new ones are."""
        floor = self._floor()
        for tenant, counter in list(self._counters.items()):
            away = tenant not in self._active and tenant != self._last_left and tenant not in keep
            if away and counter + BURST_WORK <= floor:
                del self._counters[tenant]
                self._lifted.pop(tenant, None)

    def _floor(self) -> float:
        if self._active:
            return min(self._counters[name] for name in self._active)
        return self._counters.get(self._last_left or "", 0.0)


@dataclass(slots=True)
class _Lane:
    """One tenant at one pool."""

    waiting: "OrderedDict[str, float]" = field(default_factory=OrderedDict)
    running: int = 0
    capped: bool = False


class FairQueue:
    """The queue of one pool at one gateway: bounded, fair between tenants, first come within one.

    ``places`` is how many requests may be under way, without the spare ones; ``lent`` more if they
    can leave again at any time. ``add`` and ``finish`` are followed by ``take`` until it returns
    None.
    """

    def __init__(self, places: int, waiting_max: int, waiting_max_per_tenant: int) -> None:
        self.places = places
        self.lent = 0
        self._staying: set[str] = set()
        self._waiting_max = waiting_max
        self._waiting_max_per_tenant = waiting_max_per_tenant
        self._lanes: dict[str, _Lane] = {}
        self._running: dict[str, str] = {}
        self._waiting = 0
        self.counters = VirtualCounters()
        # Of tenants that have something here, or had until lately: work given, and their weights.
        self.service: dict[str, float] = {}
        self._weights: dict[str, int] = {}
        # The service that the scheduler has counted, as of its last answer.
        self.known_service: Mapping[str, float] = {}

    @property
    def running(self) -> int:
        """Requests under way."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._waiting

    def waiting_of(self, tenant: str) -> int:
        """Requests of one tenant that wait."""
        lane = self._lanes.get(tenant)
        return len(lane.waiting) if lane is not None else 0

    def weights(self) -> dict[str, int]:
        """Weights of the tenants that have something here, or had until the last reports."""
        return dict(self._weights)

    def is_full(self, tenant: str) -> bool:
        """Whether another request of this tenant would be one too many.

        One that floods fills its own part; where all are full, each tenant keeps an equal part.
        """
        own = self.waiting_of(tenant)
        part = self._waiting_max // (len(self._lanes) + 1)
        return own >= self._waiting_max_per_tenant or (
            self._waiting >= self._waiting_max and own >= part
        )

    def add(
        self, request_id: str, tenant: str, weight: int, work: float, *, stays: bool = False
    ) -> None:
        """A request waits; ``work`` is that of its prompt. One that ``stays`` cannot use what is
        lent.
        """
        if stays:
            self._staying.add(request_id)
        lane = self._lanes.setdefault(tenant, _Lane())
        self._weights[tenant] = weight
        lane.waiting[request_id] = work
        self._waiting += 1
        if not lane.capped:
            self.counters.enter(tenant)

    def take(self) -> str | None:
        """The request that may go now, counted as under way; None if none may."""
        places = self.places + self.lent
        if len(self._running) < places:
            tenant = self.counters.first(self.counters.active)
            if tenant is not None and self._waits_for_an_own_place(tenant):
                return None  # nobody overtakes it
        elif len(self._running) < places + spare(self.places):
            waits = self.counters.active
            single = [name for name in waits if len(self._lanes[name].waiting) == 1]
            tenant = self.counters.first_below_share(single)
        else:
            tenant = None
        if tenant is None:
            return None
        lane = self._lanes[tenant]
        request_id, work = lane.waiting.popitem(last=False)
        self._staying.discard(request_id)
        self._waiting -= 1
        lane.running += 1
        self._running[request_id] = tenant
        if not lane.waiting:
            self.counters.leave(tenant)
        self._serve(tenant, work)
        return request_id

    def cancel(self, request_id: str, tenant: str) -> None:
        """A request that waited is gone."""
        self._staying.discard(request_id)
        lane = self._lanes.get(tenant)
        if lane is not None and lane.waiting.pop(request_id, None) is not None:
            self._waiting -= 1
            if not lane.waiting:
                self.counters.leave(tenant)
            self._tidy(tenant)

    def serve(self, request_id: str, output_tokens: int) -> None:
        """A request under way was given output tokens."""
        tenant = self._running.get(request_id)
        if tenant is not None:
            self._serve(tenant, OUTPUT_WORK * output_tokens)

    def finish(self, request_id: str) -> None:
        """A request under way has ended."""
        tenant = self._running.pop(request_id, None)
        if tenant is not None:
            self._lanes[tenant].running -= 1
            self._tidy(tenant)

    def cap(self, tenant: str, capped: bool) -> None:
        """A limit of its own keeps a tenant from being served, or does so no more.

        While it does, the tenant is not backlogged: it must not save up.
        """
        lane = self._lanes.setdefault(tenant, _Lane())
        lane.capped = capped
        if capped:
            self.counters.leave(tenant)
        elif lane.waiting:
            self.counters.enter(tenant)
        self._tidy(tenant)

    def forget_gone(self) -> None:
        """Drop tenants that have nothing here any more and whose service is known.

        To be called before a report, which then says that they begin again at 0.
        """
        for tenant in self._weights.keys() - self._lanes.keys():
            if self.service.get(tenant, 0.0) == self.known_service.get(tenant, 0.0):
                del self._weights[tenant]
                self.service.pop(tenant, None)
        self.counters.forget(self._weights.keys())

    def _waits_for_an_own_place(self, tenant: str) -> bool:
        """Whether the tenant's next request must stay, and all but what is lent is in use.

        Where there is nothing else it goes on, to wait for the pool to start.
        """
        request_id = next(iter(self._lanes[tenant].waiting))
        return request_id in self._staying and 0 < self.places <= len(self._running)

    def _serve(self, tenant: str, work: float) -> None:
        self.counters.charge(tenant, work, self._weights[tenant])
        self.service[tenant] = self.service.get(tenant, 0.0) + work

    def _tidy(self, tenant: str) -> None:
        lane = self._lanes[tenant]
        if not lane.waiting and not lane.running and not lane.capped:
            del self._lanes[tenant]


# -- several gateways ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PoolReport:
    """What a gateway says of a pool: work given since it started, who waits, how many run.

    ``weights`` has everybody with ``service``. ``counters`` are those it last knew: after a restart
    the scheduler learns them from here. ``finished_per_s``: requests lately.
    """

    running: int
    waiting: int
    service: Mapping[str, float]
    weights: Mapping[str, int]
    backlogged: frozenset[str]
    counters: Mapping[str, float]
    finished_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolShare:
    """What a gateway is told of a pool: all tenants' counters as of its report, and its places.

    None while nobody knows them, because no replica is ready: who waits is better served later.
    ``lent``: further ones, on leases whose holders are idle.
    """

    places: int | None
    counters: Mapping[str, float]
    service: Mapping[str, float]
    contended: bool
    lent: int = 0


class PoolLedger:
    """Merges the reports of all gateways about one pool."""

    def __init__(self) -> None:
        self.counters = VirtualCounters()
        self._reports: dict[str, PoolReport] = {}

    def report(self, gateway: str, report: PoolReport) -> None:
        """Take a gateway's report: work given since its last one, and who waits now."""
        known = self._reports.get(gateway)
        for tenant, counter in report.counters.items():
            if known is None and counter > self.counters.get(tenant):
                self.counters.set(tenant, counter)
        for tenant, work in report.service.items():
            before = 0.0 if known is None else known.service.get(tenant, 0.0)
            fresh = work - before if work >= before else work  # else it began again
            if known is not None and fresh > 0:
                self.counters.enter(tenant)  # it waited, if for a moment
                self.counters.charge(tenant, fresh, report.weights[tenant])
        self._reports[gateway] = report
        backlogged = set().union(*(r.backlogged for r in self._reports.values()))
        for tenant in backlogged - self.counters.active:
            self.counters.enter(tenant)
        for tenant in self.counters.active - backlogged:
            self.counters.leave(tenant)
        self.counters.forget(set().union(*(r.weights for r in self._reports.values())))

    def service_of(self, gateway: str) -> Mapping[str, float] | None:
        """Work that a gateway has reported; None if it is new."""
        report = self._reports.get(gateway)
        return None if report is None else report.service

    def remove(self, gateway: str) -> None:
        """A gateway is gone."""
        self._reports.pop(gateway, None)

    @property
    def contended(self) -> bool:
        """Whether anybody waits."""
        return any(report.backlogged for report in self._reports.values())

    def share(self, gateway: str, places: int | None, lent: int = 0) -> PoolShare:
        """What to tell a gateway of a pool with so many places, and so many more lent to it."""
        demands = {name: r.running + r.waiting for name, r in self._reports.items()}
        report = self._reports[gateway]
        own = None if places is None else deal(places, demands)[gateway]
        return PoolShare(
            places=0 if own is None and lent else own,
            counters=self.counters.snapshot(),
            service=report.service,
            contended=self.contended,
            lent=deal(lent, demands)[gateway] if lent else 0,
        )


def merge(queue: FairQueue, share: PoolShare) -> None:
    """Take over what the scheduler knows, plus the work given here since the report."""
    if share.places is not None:
        queue.places = share.places
        queue.lent = share.lent
    weights = queue.weights()
    for tenant, counter in share.counters.items():
        since = queue.service.get(tenant, 0.0) - share.service.get(tenant, 0.0)
        queue.counters.set(tenant, counter + since / weights.get(tenant, 1))
    queue.known_service = share.service


def deal(places: int, demands: Mapping[str, int]) -> dict[str, int]:
    """Split places between gateways: as many as each needs, the rest evenly.

    Where there are too few, max-min fair: nobody gets more than another that wants more. Everybody
    has at least one, so that a first request need not wait for the next report; the sum may exceed
    ``places`` by that.
    """
    shares = dict.fromkeys(demands, 0)
    left, wanting = places, [(need, name) for name, need in sorted(demands.items())]
    heapq.heapify(wanting)
    while wanting:
        need, name = heapq.heappop(wanting)
        shares[name] = min(need, left // (len(wanting) + 1))
        left -= shares[name]
    for place, name in enumerate(sorted(shares)):
        shares[name] += left // len(shares) + (place < left % len(shares))
    return {name: max(1, share) for name, share in shares.items()}
