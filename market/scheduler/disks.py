"""Models on the nodes' disks: what is where, pulled ahead to where it is likely to start."""

import asyncio
import logging
from collections.abc import Iterable

from market import matching
from market.errors import MarketError, NotFound
from market.forecast import BUCKET_S
from market.matching import Misfit
from market.scheduler.core import Core
from market.scheduler.elastic import Elastic
from market.scheduler.forecasts import Forecasts
from market.scheduler.pools import Pools
from market.types import Deployment, LeaseState, Offer, OfferState, StoredModel, StoredState

logger = logging.getLogger(__name__)

LOOK_S = 10.0
SEEN = (OfferState.OPEN, OfferState.DRAINING)
THERE = (StoredState.READY, StoredState.BY_HAND)
# Of its weights so much makes a model one that is in memory.
IN_MEMORY = 0.9
# A model that so likely is asked for soon is read into memory, if that has room: it may have so
# much of it.
LIKELY = 0.3
MEMORY_MAX = 0.25
MIB = 1024 * 1024
# A pull that failed is tried again after this.
RETRY_S = 600.0


class Disks:
    """Looks at the disks now and then; nodes that do not answer keep what was seen last."""

    def __init__(self, core: Core, pools: Pools, forecasts: Forecasts, elastic: Elastic) -> None:
        self._core = core
        self._pools = pools
        self._forecasts = forecasts
        self._elastic = elastic
        self._tried_s: dict[tuple[str, str], float] = {}
        self._read_s: dict[tuple[str, str], float] = {}

    async def watch_forever(self) -> None:
        """Look, and pull ahead."""
        while True:
            try:
                await self.stored()
                await self.prefetch()
                await self.read_ahead()
            except MarketError as error:
                logger.info("the disks were not seen to: %s", error)
            except Exception:
                logger.exception("the disks were not seen to")
            await asyncio.sleep(LOOK_S)

    async def stored(self) -> dict[str, tuple[StoredModel, ...]]:
        """What is on the disks of all nodes that answer, by node."""
        found: dict[str, tuple[StoredModel, ...]] = {}

        async def look(offer: Offer) -> None:
            try:
                models = await asyncio.to_thread(self._core.cluster.models, offer)
            except MarketError as error:
                logger.info("disk of %s not seen: %s", offer.node_id, error)
                return
            found[offer.node_id] = models
            names = frozenset(m.model for m in models if m.state in THERE)
            self._core.on_disk[offer.node_id] = names
            cached = frozenset(m.model for m in models if m.cached >= IN_MEMORY)
            self._core.in_memory[offer.node_id] = cached & names

        await asyncio.gather(*(look(o) for o in self._core.offers if o.state in SEEN))
        return found

    async def pull(self, name: str, nodes: Iterable[str], pin: bool | None) -> list[str]:
        """Begin to pull a model to nodes (none named: to all that can run it); their names.

        Raises NotFound, Overloaded.
        """
        model = self._core.find(name)
        offers = [self._offer(node_id) for node_id in dict.fromkeys(nodes)] or [
            offer
            for offer in self._core.offers
            if offer.state is OfferState.OPEN and matching.can_hold(offer, model)
        ]
        if not offers:
            raise NotFound(
                f"no open node can run {name}; name one with --node to pull it all the same"
            )
        for offer in offers:
            await asyncio.to_thread(self._core.cluster.pull, model, offer, pin=pin, evict=True)
        return [offer.node_id for offer in offers]

    async def remove(self, name: str, nodes: Iterable[str]) -> dict[str, int]:
        """Remove a model from nodes (none named: from all that answer); bytes by node.

        Raises NotFound, Overloaded, or Conflict if it is in use or was put there by hand, unless it
        could be removed from one at least.
        """
        freed: dict[str, int] = {}
        errors: list[MarketError] = []
        offers = [self._offer(node_id) for node_id in dict.fromkeys(nodes)] or [
            offer for offer in self._core.offers if offer.state in SEEN
        ]
        for offer in offers:
            # Else it would be pulled ahead again at once.
            self._tried_s[name, offer.node_id] = self._core.clock.monotonic()
            try:
                freed[offer.node_id] = await asyncio.to_thread(
                    self._core.cluster.remove_model, name, offer
                )
            except MarketError as error:
                errors.append(error)
            self._core.on_disk.pop(offer.node_id, None)
        if not freed:
            others = [error for error in errors if not isinstance(error, NotFound)]
            raise (
                others[0]
                if others
                else NotFound(f"{name} is on no disk (market models ls --stored)")
            )
        return freed

    async def prefetch(self) -> None:
        """Pull what may start soon where it will: pools that wake or grow, leases booked ahead."""
        now_s = self._core.clock.monotonic()
        for name, offer in await self._expected(growing=True):
            model = self._core.find(name)
            on_disk = self._core.on_disk.get(offer.node_id)
            if model.source == "local" or on_disk is None or name in on_disk:
                continue
            tried_s = self._tried_s.get((name, offer.node_id))
            if tried_s is None or now_s - tried_s > RETRY_S:
                self._tried_s[name, offer.node_id] = now_s
                try:
                    await asyncio.to_thread(
                        self._core.cluster.pull, model, offer, pin=None, evict=False
                    )
                except MarketError as error:
                    logger.info("%s not pulled to %s: %s", name, offer.node_id, error)

    async def read_ahead(self) -> None:
        """Bring what is likely to be started soon from the disk into the host's memory."""
        for name, offer in await self._expected():
            model = self._core.find(name)
            memory = self._core.in_memory.get(offer.node_id, frozenset())
            there = name in self._core.on_disk.get(offer.node_id, frozenset())
            fits = model.weights_bytes <= MEMORY_MAX * offer.memory_mib * MIB
            likely = self._forecasts.expect(name, BUCKET_S).chance >= LIKELY
            now_s, key = self._core.clock.monotonic(), (name, offer.node_id)
            again = now_s - self._read_s.get(key, float("-inf")) > RETRY_S
            if there and fits and likely and again and name not in memory:
                self._read_s[key] = now_s
                await asyncio.to_thread(self._core.cluster.read_in, model, offer)

    async def _expected(self, *, growing: bool = False) -> list[tuple[str, Offer]]:
        """What is not there and may start soon, with its node; also further replicas on request."""
        state = self._core.state
        found = [
            (lease.model, state.offers[lease.offer_id])
            for lease in self._core.open_leases()
            if lease.state is LeaseState.PENDING
        ]
        for pool in self._core.pools:
            await asyncio.sleep(0)  # to look at many nodes takes its time
            count = len(self._core.replicas_of(pool.deployment_id))
            if not count or (growing and count < pool.bounds.maximum):
                offer = self._next(pool)
                if offer is not None:
                    found.append((pool.model, offer))
        return found

    def _next(self, deployment: Deployment) -> Offer | None:
        """The node of the pool's next replica: with room now, or after an eviction."""
        places = self._pools.places(self._core.find(deployment.model), 1)
        if not isinstance(places, Misfit):
            return self._core.state.offers[places[0].offer_id]
        room = self._elastic.room_after(deployment)
        return None if room is None else room.offer

    def _offer(self, node_id: str) -> Offer:
        for offer in self._core.offers:
            if offer.node_id == node_id and offer.state is not OfferState.LEFT:
                return offer
        raise NotFound(f"no node {node_id!r} (market offers)", code="node_not_found")
