"""Pools: a model's tokens for everybody, on replicas without an end."""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from market import catalog, matching
from market.catalog import Model
from market.errors import Conflict, InvalidRequest, NoCapacity
from market.matching import Misfit
from market.scheduler.core import Core
from market.types import Deployment, Mode, Offer, Place, Replica, ReplicaState

REPLICAS_MAX = 64


class Pools:
    """Grants shares of GPUs to pools."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def open(
        self, model_name: str, engine: str | None, replicas: int, dry_run: bool
    ) -> tuple[Deployment, tuple[Replica, ...]]:
        """Sell a model's tokens to everybody; asking again for the same returns what is there.

        Raises InvalidRequest, NotFound, Conflict, or NoCapacity that says what is missing.
        """
        if not 1 <= replicas <= REPLICAS_MAX:
            raise InvalidRequest(f"replicas must be 1 to {REPLICAS_MAX}, got {replicas}")
        core, model = self._core, catalog.find(model_name)
        if await core.ledger.rate_card(model.name) is None:
            raise InvalidRequest(f"model {model.name} has no price, so it cannot be served")
        async with core.lock:
            for known in core.state.deployments.values():
                if known.model == model.name and known.mode is Mode.TOKENS:
                    _require_same(known, core.replicas_of(known.deployment_id), engine, replicas)
                    return known, tuple(core.replicas_of(known.deployment_id))
            places = self._pool_places(model, replicas)
            if engine is None:
                physical = [p for p in places if self._is_physical(p)]
                engine = "vllm" if physical and not model.embeds else "transformers"
            await asyncio.to_thread(core.cluster.check, model, engine)
            return await self._store_pool(model, engine, places, dry_run)

    async def replace_lost(self, replica: Replica, reason: str) -> bool:
        """Run a pool's replica elsewhere, if there is room. Under the lock."""
        core = self._core
        deployment = core.state.deployments.get(replica.deployment_id)
        if deployment is None or deployment.stopping:
            return False
        found = self._find_pool_places(catalog.find(deployment.model), 1)
        if isinstance(found, Misfit):
            return False
        gone = replace(replica, state=ReplicaState.STOPPING, reason=reason)
        others = core.replicas_of(deployment.deployment_id)
        number = 1 + max(int(r.replica_id.rpartition("-")[2]) for r in others)
        fresh = self._pool_replica(deployment, found[0], number)
        core.book_replica(fresh)
        await core.store.save([gone, fresh])
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

    async def _store_pool(
        self, model: Model, engine: str, places: Sequence[Place], dry_run: bool
    ) -> tuple[Deployment, tuple[Replica, ...]]:
        now = self._core.clock.now()
        deployment = Deployment(
            deployment_id=f"{model.name.replace('.', '-')}-{now:%Y%m%d%H%M%S%f}",
            model=model.name,
            mode=Mode.TOKENS,
            engine=engine,
            replicas=len(places),
            created_at=now,
        )
        fresh = [self._pool_replica(deployment, place, n) for n, place in enumerate(places)]
        if not dry_run:
            for replica in fresh:
                self._core.book_replica(replica)
            await self._core.store.save([deployment, *fresh])
        return deployment, tuple(fresh)

    def _pool_replica(self, deployment: Deployment, place: Place, number: int) -> Replica:
        return Replica(
            replica_id=f"{deployment.deployment_id}-{number}",
            deployment_id=deployment.deployment_id,
            place=place,
            state=ReplicaState.WAITING,
            reason="ordered",
            created_at=self._core.clock.now(),
        )

    def _pool_places(self, model: Model, replicas: int) -> tuple[Place, ...]:
        found = self._find_pool_places(model, replicas)
        if isinstance(found, Misfit):
            fits = [
                other.name
                for other in catalog.models()
                if not isinstance(self._find_pool_places(other, 1), Misfit)
            ]
            others = [name for name in fits if name != model.name]
            hint = f"; what would fit: {', '.join(others)}" if others else ""
            raise NoCapacity(found.reason + hint)
        return found

    def _find_pool_places(self, model: Model, replicas: int) -> tuple[Place, ...] | Misfit:
        core = self._core
        taken: dict[str, int] = defaultdict(int)
        for replica in core.state.replicas.values():
            deployment = core.state.deployments.get(replica.deployment_id)
            if deployment is not None and not replica.place.gpu_indices:
                taken[replica.place.offer_id] += catalog.find(deployment.model).memory_mib
        now = core.clock.now()
        return matching.place_pool(model, replicas, core.offers, core.calendar, taken, now)

    def _is_physical(self, place: Place) -> bool:
        offer = self._core.state.offers[place.offer_id]
        return bool(place.gpu_indices) and not offer.logical


def _require_same(
    known: Deployment, replicas: Sequence[Replica], engine: str | None, count: int
) -> None:
    """Raises Conflict if the pool that is there is not the one asked for."""
    failed = [r for r in replicas if r.state is ReplicaState.FAILED]
    if known.stopping or (failed and len(failed) == len(replicas)):
        state = "stopping" if known.stopping else f"failed ({failed[0].reason})"
        raise Conflict(
            f"{known.model} is {state}; run market undeploy {known.model}, then deploy again"
        )
    if count != known.replicas or engine not in (None, known.engine):
        raise Conflict(
            f"{known.model} is deployed with {known.replicas} replica(s) of {known.engine}; "
            f"run market undeploy {known.model} first"
        )
