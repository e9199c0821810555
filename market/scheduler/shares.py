"""Token slices and shares of pools: what gateways ask for, and what they are told of each other."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from market.accounts import HoldResult
from market.autoscaling import Demand
from market.catalog import Model
from market.fairness import OUTPUT_WORK, PoolLedger, PoolReport, PoolShare
from market.ports import Clock
from market.types import HoldChange, HoldRequest, RouteTable, SliceAsk

logger = logging.getLogger(__name__)

# A gateway that has said nothing for so long has no part in pools any more.
SILENT_S = 5.0
# Other gateways are asked to give a tenant's money back for so long after it was missed.
RECALL_S = 2.0
# While a pool is contended, a slice pays for so many seconds of its tenant's fair share.
SHARE_S = 2.0
RATE_TAU_S = 10.0
# A gateway that has reported so long after a replica began to drain knew of it, and sends nothing
# more there.
DRAINING_KNOWN_S = 2.0


class SliceLedger(Protocol):
    """The part of the ledger that keeps slices."""

    async def open_hold(self, request: HoldRequest) -> HoldResult:
        """Set money aside."""
        ...

    async def resize_hold(self, producer: str, epoch: int, change: HoldChange) -> HoldResult:
        """Let a hold grow or shrink."""
        ...


@dataclass(frozen=True, slots=True)
class GatewayReport:
    """What a gateway says twice a second. ``limited_keys`` were used lately and have limits.

    ``cold``: requests that wait for a model to start. By replica (application), of this gateway's
    answers under way: ``streams`` how many, ``borrowed`` how many of them on a lease that was lent
    (each is a request of its own), ``kv_used`` their part of its KV cache.
    """

    producer: str
    epoch: int
    pools: Mapping[str, PoolReport]
    limited_keys: frozenset[str]
    cold: Mapping[str, int] = field(default_factory=dict)
    streams: Mapping[str, int] = field(default_factory=dict)
    kv_used: Mapping[str, float] = field(default_factory=dict)
    borrowed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GatewayOrders:
    """What it is told: routes, its part of pools and of keys' limits, whose money to give back.

    ``key_gateways``: how many gateways share a key's limits. ``models``: what the operator added to
    the catalog.
    """

    routes: RouteTable
    pools: Mapping[str, PoolShare]
    key_gateways: Mapping[str, int]
    recalls: frozenset[str]
    models: tuple[Model, ...] = ()


@dataclass(slots=True)
class _Gateway:
    heard_s: float
    report: GatewayReport


class Decaying:
    """How much a second, lately: each amount is forgotten over ``RATE_TAU_S``."""

    def __init__(self, now_s: float) -> None:
        self._rate, self._at_s = 0.0, now_s

    def add(self, amount: float, now_s: float) -> None:
        """So much was just now."""
        self._rate, self._at_s = self.get(now_s) + amount / RATE_TAU_S, now_s

    def get(self, now_s: float) -> float:
        """The rate now."""
        return self._rate * max(0.0, 1 - (now_s - self._at_s) / RATE_TAU_S)


class Shares:
    """Merges what gateways report; grants slices. All of it is in memory: gateways say it again."""

    def __init__(self, clock: Clock, ledger: SliceLedger) -> None:
        self._clock = clock
        self._ledger = ledger
        self._gateways: dict[str, _Gateway] = {}
        self._pools: dict[str, PoolLedger] = {}
        self._rates: dict[str, Decaying] = {}
        self._asked: dict[str, Decaying] = {}
        self._recalls: dict[str, tuple[str, float]] = {}

    async def grant(self, ask: SliceAsk) -> HoldResult:
        """Open or grow a slice: what is asked, or where tenants wait, at most a fair share ahead.

        Raises Conflict if the gateway is fenced.
        """
        if ask.opens is not None:
            wanted = self._sized(ask, ask.opens.wanted_pico, ask.opens.minimum_pico)
            result = await self._ledger.open_hold(replace(ask.opens, wanted_pico=wanted))
        else:
            assert ask.changes is not None
            wanted = self._sized(ask, ask.changes.wanted_pico, ask.changes.minimum_pico)
            change = replace(ask.changes, wanted_pico=wanted)
            result = await self._ledger.resize_hold(ask.producer, ask.epoch, change)
        if result.hold is not None:
            self._count_asked(ask)
        if result.hold is None and result.elsewhere_pico:
            until_s = self._clock.monotonic() + RECALL_S
            self._recalls[ask.tenant_id] = (ask.producer, until_s)
        return result

    def sync(self, report: GatewayReport, routes: RouteTable) -> GatewayOrders:
        """Take a gateway's report; tell it its shares."""
        now_s = self._clock.monotonic()
        known = self._gateways.get(report.producer)
        if known is not None and known.report.epoch != report.epoch:
            self._drop(report.producer)
        self._gateways[report.producer] = _Gateway(now_s, report)
        for name in [n for n, g in self._gateways.items() if now_s - g.heard_s > SILENT_S]:
            logger.warning("gateway %s is silent", name)
            self._drop(name)
        for pool_name, own in report.pools.items():
            pool = self._pools.setdefault(pool_name, PoolLedger())
            self._measure(pool_name, report.producer, own, now_s)
            pool.report(report.producer, own)
        places, lent = pool_places(routes), lent_places(routes, self._in_use())
        recalls = {
            tenant
            for tenant, (asker, until_s) in self._recalls.items()
            if now_s < until_s and asker != report.producer
        }
        return GatewayOrders(
            routes=replace(routes, gateways=len(self._gateways)),
            pools={
                name: self._pools[name].share(report.producer, places.get(name), lent[name])
                for name in report.pools
            },
            key_gateways=self._key_gateways(report),
            recalls=frozenset(recalls),
        )

    def contended(self, pool_name: str) -> bool:
        """Whether anybody waits for a pool."""
        pool = self._pools.get(pool_name)
        return pool is not None and pool.contended

    @property
    def heard(self) -> bool:
        """Whether any gateway has said what it does: else nobody knows what is asked."""
        return bool(self._gateways)

    def demand(self, pool_name: str, apps: Sequence[str] = (), lent: Iterable[str] = ()) -> Demand:
        """What all gateways together ask of a pool's own replicas, the ``apps``.

        Not what runs on leases that are ``lent`` (applications).
        """
        now_s = self._clock.monotonic()
        reports = [gateway.report for gateway in self._gateways.values()]
        pools = [report.pools[pool_name] for report in reports if pool_name in report.pools]
        borrowed = sum(report.borrowed.get(app, 0) for app in lent for report in reports)
        return Demand(
            running=max(0, sum(pool.running for pool in pools) - borrowed),
            waiting=sum(pool.waiting for pool in pools),
            cold=sum(report.cold.get(pool_name, 0) for report in reports),
            finished_per_s=sum(pool.finished_per_s for pool in pools),
            work_per_s=_rate(self._rates, pool_name, now_s),
            asked_per_s=_rate(self._asked, pool_name, now_s),
            kv_used=sum(r.kv_used.get(app, 0.0) for r in reports for app in apps)
            / max(1, len(apps)),
        )

    def _in_use(self) -> dict[str, int]:
        """Requests that run or wait, by pool and lease."""
        found: Counter[str] = Counter()
        for gateway in self._gateways.values():
            for name, pool in gateway.report.pools.items():
                found[name] += pool.running + pool.waiting
        return found

    def streams(self, app_name: str) -> int:
        """Answers under way on a replica."""
        return sum(g.report.streams.get(app_name, 0) for g in self._gateways.values())

    def is_quiet(self, app_name: str, draining_since_s: float) -> bool:
        """Whether nobody uses a replica that drains, nor will."""
        known_s = draining_since_s + DRAINING_KNOWN_S
        return self.streams(app_name) == 0 and all(
            gateway.heard_s > known_s for gateway in self._gateways.values()
        )

    def _sized(self, ask: SliceAsk, wanted_pico: int, minimum_pico: int) -> int:
        pool = self._pools.get(ask.model)
        if pool is None or not pool.contended:
            return wanted_pico
        weights = self._weights(ask.model) | {ask.tenant_id: ask.weight}
        active = pool.counters.active | {ask.tenant_id}
        part = ask.weight / sum(weights.get(name, 1) for name in active)
        rate = _rate(self._rates, ask.model, self._clock.monotonic())
        ahead_pico = round(rate * SHARE_S * part / max(1, len(self._gateways)) * ask.output_pico)
        return max(ask.has_pico, minimum_pico, min(wanted_pico, minimum_pico + ahead_pico))

    def _measure(self, pool_name: str, producer: str, report: PoolReport, now_s: float) -> None:
        """Weighted tokens per second that a pool gives, over all gateways."""
        before = self._pools[pool_name].service_of(producer)
        work = sum(
            max(0.0, served - (before or {}).get(tenant, 0.0))
            for tenant, served in report.service.items()
        )
        self._rates.setdefault(pool_name, Decaying(now_s)).add(
            0.0 if before is None else work, now_s
        )

    def _count_asked(self, ask: SliceAsk) -> None:
        """What requests need now, as work; what is only asked ahead of them is not counted."""
        change = ask.opens or ask.changes
        if change is None or not ask.output_pico:
            return
        tokens = max(0, change.minimum_pico - ask.has_pico) / ask.output_pico
        now_s = self._clock.monotonic()
        self._asked.setdefault(ask.model, Decaying(now_s)).add(tokens * OUTPUT_WORK, now_s)

    def _weights(self, pool_name: str) -> dict[str, int]:
        weights: dict[str, int] = {}
        for gateway in self._gateways.values():
            report = gateway.report.pools.get(pool_name)
            weights |= {} if report is None else dict(report.weights)
        return weights

    def _key_gateways(self, report: GatewayReport) -> dict[str, int]:
        others = [gateway.report.limited_keys for gateway in self._gateways.values()]
        return {key: sum(key in keys for keys in others) for key in report.limited_keys}

    def _drop(self, producer: str) -> None:
        self._gateways.pop(producer, None)
        for pool in self._pools.values():
            pool.remove(producer)


def _rate(rates: Mapping[str, Decaying], pool_name: str, now_s: float) -> float:
    known = rates.get(pool_name)
    return 0.0 if known is None else known.get(now_s)


def pool_places(routes: RouteTable) -> dict[str, int]:
    """How many answers each pool's ready replicas can generate at once."""
    places: Counter[str] = Counter()
    for route in routes.ready:
        places[route.lease_id or route.model] += route.places
    return places


def lent_places(routes: RouteTable, in_use: Mapping[str, int]) -> Counter[str]:
    """How many more each pool has on leases that are lent to it and that nobody else uses."""
    places: Counter[str] = Counter()
    for route in routes.lent:
        if route.loan is not None and not in_use.get(route.loan.lease_id):
            places[route.model] += route.places
    return places
