"""Pools: a model's tokens for everybody, on replicas without an end."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from market import matching
from market.catalog import Model
from market.errors import Conflict, InvalidRequest, NoCapacity
from market.matching import Misfit
from market.pricing import format_money
from market.scheduler.core import Core
from market.types import Bounds, Deployment, Mode, Offer, Place, Replica, ReplicaState

REPLICAS_MAX = 64
KEEP_ALIVE_LEAST_S = 1.0
LIKELY_S = 2.0


class Pools:
    """Grants shares of GPUs to pools."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._likely: dict[tuple[Model, bool], tuple[float, tuple[Place, ...]]] = {}

    async def open(
        self, model_name: str, engine: str | None, bounds: Bounds, dry_run: bool
    ) -> tuple[Deployment, tuple[Replica, ...]]:
        """Sell a model's tokens to everybody; asked again, the bounds are changed to these.

        It begins with as many replicas as it must have at least. Raises InvalidRequest, NotFound,
        Conflict, or NoCapacity that says what is missing.
        """
        _check(bounds)
        core = self._core
        model = core.find(model_name)
        if await core.ledger.rate_card(model.name) is None:
            raise InvalidRequest(f"model {model.name} has no price, so it cannot be served")
        async with core.lock:
            model = core.find(model.name)  # it may have been forgotten meanwhile
            for known in core.state.deployments.values():
                if known.model == model.name and known.mode is Mode.TOKENS:
                    there = core.replicas_of(known.deployment_id)
                    _require_same(known, there, engine)
                    self._require_paid(bounds, model, [replica.place for replica in there])
                    changed = replace(known, bounds=bounds)
                    if changed != known and not dry_run:
                        await core.store.save([changed])
                    return changed, tuple(there)
            lent = core.lent(model.name)
            if lent and bounds.minimum == 0:  # leases' idle time can be sold, if nothing else
                places: tuple[Place, ...] = ()
                engine = engine or lent[0].engine
            elif bounds.minimum == 0:  # it must fit where idle pools make room
                places = self._pool_places(model, 1, emptied=True)
                self._require_paid(bounds, model, places)
            else:
                places = self._pool_places(model, bounds.minimum)
            if engine is None:
                physical = [p for p in places if self._is_physical(p)]
                engine = "vllm" if physical and not model.embeds else "transformers"
            await asyncio.to_thread(core.cluster.check, model, engine)
            deployment = self._deployment(model, engine, bounds)
            fresh = [
                self._pool_replica(deployment, place, number)
                for number, place in enumerate(places[: bounds.minimum])
            ]
            if not dry_run:
                await core.grant(fresh, deployment)
            return deployment, tuple(fresh)

    async def add_replica(self, deployment_id: str, most_pico: int | None = None) -> Misfit | None:
        """One more replica, for at most so much an hour, or why there is no room for it.

        Under the lock.
        """
        deployment = self._core.state.deployments[deployment_id]
        found = self.places(self._core.find(deployment.model), 1, most_pico=most_pico)
        if isinstance(found, Misfit):
            return found
        await self._add(deployment, found[0])
        return None

    async def replace_lost(self, replica: Replica, reason: str) -> bool:
        """Run a pool's replica elsewhere, if there is room. Under the lock."""
        core = self._core
        deployment = core.state.deployments.get(replica.deployment_id)
        if deployment is None or deployment.stopping:
            return False
        found = self.places(self._core.find(deployment.model), 1)
        if isinstance(found, Misfit):
            return False
        gone = replace(replica, state=ReplicaState.STOPPING, reason=reason)
        if replica.state is not ReplicaState.DRAINING:
            await self._add(deployment, found[0], gone)
        else:
            await core.store.save([gone])
        return True

    async def leave(self, offer: Offer) -> None:
        """Take replicas off a node that leaves: they run elsewhere if there is room."""
        core = self._core
        async with core.lock:
            for replica in list(core.state.replicas.values()):
                ending = replica.state in (ReplicaState.STOPPING, ReplicaState.FREEING)
                if replica.place.offer_id != offer.offer_id or ending:
                    continue
                reason = f"node {offer.node_id} leaves"
                if not await self.replace_lost(replica, reason):
                    gone = replace(replica, state=ReplicaState.STOPPING, reason=reason)
                    await core.store.save([gone])

    async def close(self, deployment: Deployment) -> Deployment:
        """Stop selling: its replicas drain and their GPUs become free."""
        async with self._core.lock:
            stopping = replace(deployment, stopping=True)
            replicas = self._core.running(deployment.deployment_id)
            stop = partial(replace, state=ReplicaState.STOPPING, reason="draining")
            await self._core.store.save([stopping, *(stop(replica) for replica in replicas)])
            return stopping

    async def _add(self, deployment: Deployment, place: Place, *gone: Replica) -> None:
        fresh = self._pool_replica(deployment, place, deployment.made)
        counted = replace(deployment, made=deployment.made + 1)
        await self._core.grant([fresh], *gone, counted)

    def _deployment(self, model: Model, engine: str, bounds: Bounds) -> Deployment:
        now = self._core.clock.now()
        return Deployment(
            deployment_id=f"{model.name.replace('.', '-')}-{now:%Y%m%d%H%M%S%f}",
            model=model.name,
            mode=Mode.TOKENS,
            engine=engine,
            bounds=bounds,
            created_at=now,
            made=bounds.minimum,
        )

    def _pool_replica(self, deployment: Deployment, place: Place, number: int) -> Replica:
        return Replica(
            replica_id=f"{deployment.deployment_id}-{number}",
            deployment_id=deployment.deployment_id,
            place=place,
            state=ReplicaState.WAITING,
            reason="ordered",
            created_at=self._core.clock.now(),
        )

    def _pool_places(
        self, model: Model, replicas: int, *, emptied: bool = False
    ) -> tuple[Place, ...]:
        found = self.places(model, replicas, emptied=emptied)
        if isinstance(found, Misfit):
            fits = [
                other.name
                for other in self._core.models()
                if not isinstance(self.places(other, 1, emptied=emptied), Misfit)
            ]
            others = [name for name in fits if name != model.name]
            hint = f"; what would fit: {', '.join(others)}" if others else ""
            raise NoCapacity(found.reason + hint)
        return found

    def places(
        self,
        model: Model,
        replicas: int,
        *,
        emptied: bool = False,
        most_pico: int | None = None,
    ) -> tuple[Place, ...] | Misfit:
        """Where so many replicas would go right now, or why they cannot.

        With ``emptied``, as if no pool had any. Each costs at most ``most_pico`` an hour.
        """
        core = self._core
        pools, taken = [], defaultdict[str, int](int)
        memory_mib = {known.name: known.memory_mib for known in core.models()}
        for replica in core.state.replicas.values():
            deployment = core.state.deployments.get(replica.deployment_id)
            if deployment is not None and deployment.mode is Mode.TOKENS:
                pools.append(replica)
                if not replica.place.gpu_indices and not emptied:
                    taken[replica.place.offer_id] += memory_mib.get(deployment.model, 0)
        leaving = core.by_offer(pools if emptied else ())
        free = {o.offer_id: core.free_milli(o, leaving.get(o.offer_id, ())) for o in core.offers}
        now, offers = core.clock.now(), core.offers
        if most_pico is not None:
            milli = {o.offer_id: matching.share_milli(model, o) or 0 for o in offers}
            offers = [o for o in offers if matching.hour_pico(o, milli[o.offer_id]) <= most_pico]
        return matching.place_pool(
            model, replicas, offers, free, taken, now, core.on_disk, core.in_memory
        )

    def _require_paid(self, bounds: Bounds, model: Model, places: Iterable[Place]) -> None:
        """Raises InvalidRequest if a budget pays for none of these, nor for the next."""
        most_pico, cheapest = bounds.spend_max_pico, self.places(model, 1, emptied=True)
        both = places if isinstance(cheapest, Misfit) else (*places, *cheapest)
        cheapest_pico = min((self._core.hour_pico(place) for place in both), default=0)
        if most_pico is not None and most_pico < cheapest_pico and not bounds.minimum:
            raise InvalidRequest(
                f"max_spend: {format_money(most_pico)} an hour pays for no replica; the cheapest "
                f"costs {format_money(cheapest_pico)}",
                param="max_spend",
            )

    def next_places(self, model: Model, *, emptied: bool = True) -> tuple[Place, ...]:
        """Where the next replica goes; () if it fits nowhere.

        With ``emptied`` it may be where others would have to make room first.
        """
        found = self.places(model, 1)
        if isinstance(found, Misfit) and emptied:
            found = self.places(model, 1, emptied=True)
        return () if isinstance(found, Misfit) else found

    def likely_places(self, model: Model, *, emptied: bool = True) -> tuple[Place, ...]:
        """``next_places`` a moment ago: for what is asked of every pool in every round."""
        now_s, key = self._core.clock.monotonic(), (model, emptied)
        known = self._likely.get(key)
        if known is None or now_s - known[0] >= LIKELY_S:
            self._likely = {k: v for k, v in self._likely.items() if now_s - v[0] < LIKELY_S}
            known = self._likely[key] = now_s, self.next_places(model, emptied=emptied)
        return known[1]

    def _is_physical(self, place: Place) -> bool:
        offer = self._core.state.offers[place.offer_id]
        return bool(place.gpu_indices) and not offer.logical


def _check(bounds: Bounds) -> None:
    """Raises InvalidRequest."""
    least, most = bounds.minimum, bounds.maximum
    if not 0 <= least <= most or not 1 <= most <= REPLICAS_MAX:
        raise InvalidRequest(
            f"replicas must be MIN:MAX with 0 <= MIN <= MAX and MAX 1 to {REPLICAS_MAX}, "
            f"got {least}:{most}",
            param="replicas",
        )
    if bounds.keep_alive_s is not None and bounds.keep_alive_s < KEEP_ALIVE_LEAST_S:
        raise InvalidRequest(
            f"keep_alive: {KEEP_ALIVE_LEAST_S:g} s at least, got {bounds.keep_alive_s:g}",
            param="keep_alive",
        )


def _require_same(known: Deployment, replicas: Sequence[Replica], engine: str | None) -> None:
    """Raises Conflict if the pool that is there is not the one asked for."""
    failed = [r for r in replicas if r.state is ReplicaState.FAILED]
    if known.stopping or (failed and len(failed) == len(replicas)):
        state = "stopping" if known.stopping else f"failed ({failed[0].reason})"
        raise Conflict(
            f"{known.model} is {state}; run market undeploy {known.model}, then deploy again"
        )
    if engine not in (None, known.engine):
        raise Conflict(
            f"{known.model} is deployed with {known.engine}; "
            f"run market undeploy {known.model} first"
        )
