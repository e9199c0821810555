"""What the parts of the scheduler share: state, calendar, ports, and one lock for decisions."""

import asyncio
import contextlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Protocol

from market import catalog, matching
from market.accounts import Hold, HoldResult
from market.calendar import Calendar, Oversubscribed
from market.catalog import Model
from market.config import Config
from market.leasing import PRODUCER, Leasing
from market.matching import micros
from market.ports import Clock
from market.scheduler.store import State, Store, Value
from market.types import (
    ClusterView,
    Deployment,
    HoldChange,
    HoldRequest,
    Lease,
    LeaseState,
    Mode,
    Offer,
    Place,
    RateCard,
    Replica,
    ReplicaState,
    Spare,
    StoredModel,
    UsageRecord,
)

logger = logging.getLogger(__name__)

# What ends by itself on a node is noticed within so long.
ROOM_S = 10.0


class Cluster(Protocol):
    """Where applications run: Ray and Ray Serve, or a fake. All calls may block."""

    def check(self, model: Model, engine: str) -> None:
        """Raises InvalidRequest or NotFound if the engine or the model's files are missing."""
        ...

    def look(self) -> ClusterView:
        """Nodes and applications right now."""
        ...

    def start(self, replica: Replica, deployment: Deployment, model: Model, offer: Offer) -> None:
        """Begin to run a replica's application, or change it to what the replica's state says.

        Returns before it is ready.
        """
        ...

    def start_spare(self, spare: Spare, offer: Offer) -> None:
        """Begin to run a process that waits for a model."""
        ...

    def can_sleep(self, engine: str, offer: Offer) -> bool:
        """Whether an engine can leave the node's GPUs without ending."""
        ...

    def remove(self, app_name: str) -> None:
        """Begin to drain and remove an application."""
        ...

    def residents(self, node_id: str) -> frozenset[str]:
        """Replicas with processes on a node. Raises Overloaded if it does not answer."""
        ...

    def memory_taken(self, node_id: str, others_milli: Mapping[int, int]) -> frozenset[int]:
        """Which of these GPUs have more memory in use than the shares of others explain."""
        ...

    def end(self, replica_id: str, node_id: str) -> None:
        """End what a replica left running on a node."""
        ...

    def models(self, offer: Offer) -> tuple[StoredModel, ...]:
        """What is on a node's disk. Raises Overloaded if it does not answer."""
        ...

    def pull(self, model: Model, offer: Offer, *, pin: bool | None, evict: bool) -> None:
        """Begin to pull a model to a node, in the place of others only with ``evict``.

        ``pin``: keep it until it is unpinned, or unpin it; None leaves that as it is.
        Raises Overloaded if it does not answer.
        """
        ...

    def read_in(self, model: Model, offer: Offer) -> None:
        """Begin to read a model's weights from a node's disk into its memory. Raises Overloaded."""
        ...

    def remove_model(self, name: str, offer: Offer) -> int:
        """Remove a model from a node's disk; the bytes that it had.

        Raises Overloaded, NotFound, Conflict if it is in use.
        """
        ...


class LedgerPort(Protocol):
    """The part of the ledger that the scheduler needs."""

    async def rate_card(self, model: str) -> RateCard | None:
        """The price in force, None if there is none."""
        ...

    async def add_rate_cards(self, cards: list[RateCard], only_new_models: bool) -> None:
        """Add prices."""
        ...

    async def register_producer(self, producer: str) -> int:
        """A new epoch."""
        ...

    async def open_hold(self, request: HoldRequest) -> HoldResult:
        """Set money aside."""
        ...

    async def resize_hold(self, producer: str, epoch: int, change: HoldChange) -> HoldResult:
        """Let a hold grow or shrink."""
        ...

    async def end_hold(self, producer: str, epoch: int, hold_id: str) -> None:
        """Give back what is left of a hold."""
        ...

    async def arrivals(self, since: datetime) -> list[tuple[str, int, int, float]]:
        """(model, bucket, requests, seconds under way) of pools' requests; see forecast.py."""
        ...

    async def open_holds(self) -> list[Hold]:
        """Holds that have not ended."""
        ...


SendUsage = Callable[[tuple[str, int], int, Sequence[UsageRecord]], Awaitable[int]]


class Shelf:
    """The LeaseShelf port over the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def epoch(self) -> int:
        """The scheduler's epoch as a producer."""
        return self._store.state.epoch

    @property
    def leases(self) -> Mapping[str, Lease]:
        """All leases."""
        return self._store.state.leases

    def unsent(self) -> Iterable[str]:
        """Leases with segments in the outbox."""
        return {lease_id for lease_id, _ in self._store.state.outbox.values()}

    async def keep(self, lease: Lease, records: Sequence[UsageRecord]) -> None:
        """Store a lease and its segments."""
        await self._store.save([lease], records=[(lease.lease_id, r) for r in records])


class Core:
    """Decisions are made and stored under ``lock``: two must not be given the same place."""

    def __init__(
        self, config: Config, clock: Clock, ledger: LedgerPort, cluster: Cluster, store: Store
    ) -> None:
        self.config = config
        self.clock = clock
        self.ledger = ledger
        self.cluster = cluster
        self.store = store
        self.leasing = Leasing(ledger, Shelf(store))
        self.calendar = Calendar()
        # Models on nodes' disks, and those of them in the page cache, as they were seen last.
        self.on_disk: dict[str, frozenset[str]] = {}
        self.in_memory: dict[str, frozenset[str]] = {}
        # Processes that wait for a model, by name. After a restart there are none: others are made.
        self.spares: dict[str, Spare] = {}
        self.lock = asyncio.Lock()
        self._bookings: dict[str, str] = {}
        self._rooms: dict[str, tuple[float, tuple[int, int], tuple[int, ...]]] = {}
        self._numbers = itertools.count()
        self._grouped: tuple[tuple[int, int], dict[str, list[Replica]]] = (0, 0), {}

    @property
    def state(self) -> State:
        """Everything as it is stored."""
        return self.store.state

    @property
    def offers(self) -> list[Offer]:
        """All offers, by id."""
        return [self.state.offers[name] for name in sorted(self.state.offers)]

    def models(self) -> tuple[Model, ...]:
        """The catalog, with what the operator added."""
        return catalog.models(tuple(self.state.models.values()))  # at once: threads ask, too

    def find(self, name: str) -> Model:
        """An entry of the catalog. Raises NotFound."""
        return catalog.find(name, tuple(self.state.models.values()))

    def by_offer(self, replicas: Iterable[Replica]) -> dict[str, list[Replica]]:
        """Replicas by where they are."""
        found = defaultdict(list)
        for replica in replicas:
            found[replica.place.offer_id].append(replica)
        return found

    @property
    def pools(self) -> list[Deployment]:
        """Pools that are being sold, oldest first; not of models that the catalog has lost."""
        known = {model.name for model in self.models()}
        pools = [
            d
            for d in self.state.deployments.values()
            if d.mode is Mode.TOKENS and not d.stopping and d.model in known
        ]
        return sorted(pools, key=lambda pool: (pool.created_at, pool.deployment_id))

    async def register(self) -> None:
        """Take an epoch before the first hold, once in the market's life.

        There is one scheduler, locked to its tables, so it needs no other: its holds stay open and
        its segments stay numbered over restarts. Under the lock.
        """
        if not self.state.epoch:
            epoch = await self.ledger.register_producer(PRODUCER)
            await self.store.save(epoch=epoch)

    def open_leases(self) -> list[Lease]:
        """Leases that are not closed, oldest first."""
        leases = [v for v in self.state.leases.values() if v.state is not LeaseState.CLOSED]
        return sorted(leases, key=lambda lease: (lease.created_at, lease.lease_id))

    def lent(self, model: str) -> list[Lease]:
        """A model's open leases whose holders let idle time be sold."""
        return [lease for lease in self.open_leases() if lease.resale and lease.model == model]

    def in_state(self, state: ReplicaState) -> list[Replica]:
        """All replicas in a state."""
        return [r for r in self.state.replicas.values() if r.state is state]

    def replicas_of(self, deployment_id: str) -> list[Replica]:
        """A deployment's replicas, oldest first."""
        seen = id(self.state), self.store.replica_changes
        if self._grouped[0] != seen:
            groups = defaultdict(list)
            order = sorted(self.state.replicas.values(), key=lambda r: (r.created_at, r.replica_id))
            for replica in order:
                groups[replica.deployment_id].append(replica)
            self._grouped = seen, dict(groups)
        return list(self._grouped[1].get(deployment_id, ()))

    def running(self, deployment_id: str) -> list[Replica]:
        """Those of its replicas that are not on their way out."""
        ending = (ReplicaState.STOPPING, ReplicaState.FREEING)
        return [r for r in self.replicas_of(deployment_id) if r.state not in ending]

    def rebuild_calendar(self) -> None:
        """Book everything that holds GPUs, from the stored state."""
        self.calendar = Calendar()
        self._rooms.clear()
        for offer in self.offers:
            self.calendar.set_node(offer.node_id, len(offer.gpus))
        # What was is settled: only from now on must everything fit together.
        now = self.clock.now()
        self.calendar.expire(micros(now))
        pools = [r for r in self.state.replicas.values() if self._is_pool(r) and has_gpus(r)]
        leases = [lease for lease in self.open_leases() if lease.end > now]
        for replica in sorted(pools, key=lambda r: r.replica_id):
            self._restore(partial(self.book_replica, replica), replica.replica_id)
        for lease in sorted(leases, key=lambda lease: not lease.gpu_indices):
            self._restore(partial(self.book_lease, lease), lease.lease_id)

    def book_lease(self, lease: Lease) -> Lease:
        """Put a lease into the calendar; it may be bound to a GPU by that. Raises Oversubscribed.

        A floating one that is bound is like any other.
        """
        start, end = micros(lease.start), micros(lease.end)
        offer = self.state.offers[lease.offer_id]
        if lease.gpu_indices:
            places = matching.positions(offer, lease.gpu_indices)
            self.calendar.book(lease.lease_id, lease.node_id, places, lease.gpu_milli, start, end)
            return lease
        early = self.calendar.book_any(lease.lease_id, lease.node_id, start, end)
        if early is None:
            return lease
        return replace(lease, gpu_indices=matching.indices(offer, [early]))

    def book_replica(self, replica: Replica) -> None:
        """Put a pool's replica into the calendar, without an end. Raises Oversubscribed."""
        place = replica.place
        if place.gpu_indices:
            offer = self.state.offers[place.offer_id]
            places = matching.positions(offer, place.gpu_indices)
            start = micros(self.clock.now())
            # One that slept books again, and an id of the calendar is never used again.
            booking_id = f"{replica.replica_id}/{next(self._numbers)}"
            self.calendar.book(booking_id, place.node_id, places, place.gpu_milli, start, None)
            self._bookings[replica.replica_id] = booking_id

    async def grant(self, replicas: Sequence[Replica], *values: Value) -> None:
        """Book pools' replicas and store them with ``values``, or nothing. Raises Oversubscribed,
        or Overloaded if it cannot be stored.
        """
        try:
            for replica in replicas:
                self.book_replica(replica)
            await self.store.save([*values, *replicas])
        except BaseException:
            for replica in replicas:
                self.unbook(replica.replica_id, self.clock.now())
            raise

    def free_milli(self, offer: Offer, leaving: Iterable[Replica] = ()) -> list[int]:
        """What is free of each of its GPUs without an end, when these replicas there have left."""
        free = list(self._room(offer))
        for replica in leaving:
            if has_gpus(replica):
                for position in matching.positions(offer, replica.place.gpu_indices):
                    free[position] += replica.place.gpu_milli
        return free

    def _room(self, offer: Offer) -> tuple[int, ...]:
        """Asked for every node by every pool in every round, so it is remembered for a while."""
        node_id, now_s = offer.node_id, self.clock.monotonic()
        changes = self.calendar.changes(node_id), len(offer.gpus)
        known = self._rooms.get(node_id)
        if known is None or known[1] != changes or now_s - known[0] >= ROOM_S:
            room = self.calendar.room(node_id, micros(self.clock.now()), None)
            known = self._rooms[node_id] = now_s, changes, room
        return known[2]

    def hour_pico(self, place: Place) -> int:
        """What an hour of a place is offered for."""
        offer = self.state.offers[place.offer_id]
        return matching.hour_pico(offer, place.gpu_milli * len(place.gpu_indices))

    def unbook(self, name: str, at: datetime) -> None:
        """Nothing of a lease's or replica's booking is left from ``at`` on; no booking is fine."""
        with contextlib.suppress(ValueError):
            self.calendar.cut(self._bookings.pop(name, name), micros(at))

    def _is_pool(self, replica: Replica) -> bool:
        deployment = self.state.deployments.get(replica.deployment_id)
        return deployment is None or deployment.lease_id is None

    def _restore(self, book: Callable[[], object], name: str) -> None:
        try:
            book()
        except (Oversubscribed, KeyError, ValueError) as error:
            # It keeps what it has: the reconciler starts nothing beside it. New orders are
            # refused by what the calendar does know.
            logger.error("ALARM %s is not in the calendar: %r", name, error)


def has_gpus(replica: Replica) -> bool:
    """Whether its place is taken: one that is asleep has left it."""
    return replica.state is not ReplicaState.ASLEEP
