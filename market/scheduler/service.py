"""The scheduler service: takes orders for deployments and reconciles the cluster with them."""

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from market import catalog, placement, storage
from market.config import Config
from market.errors import Conflict, InvalidRequest, NoCapacity, NotFound
from market.ports import Clock
from market.scheduler import reconcile, store
from market.types import (
    AppStatus,
    Deployment,
    DeploymentState,
    Lane,
    Mode,
    Offer,
    RateCard,
    Route,
    RouteTable,
)

logger = logging.getLogger(__name__)

RECONCILE_S = 0.5
REPLICAS_MAX = 64


class Cluster(Protocol):
    """Where applications run: Ray Serve, or a fake."""

    def check(self, model: catalog.Model, engine: str) -> None:
        """Raises InvalidRequest or NotFound if the engine or the model's files are missing."""
        ...

    def observe(self) -> dict[str, AppStatus]:
        """Applications by name."""
        ...

    def start(self, deployment: Deployment, offer: Offer) -> None:
        """Begin to run an application; returns before it is ready."""
        ...

    def remove(self, app_name: str) -> None:
        """Begin to drain and remove an application."""
        ...


class Prices(Protocol):
    """The part of the ledger that says what a model costs."""

    async def rate_card(self, model: str) -> RateCard | None:
        """The price in force, None if there is none."""
        ...


class Scheduler:
    """Start it with ``open``; every other public coroutine is one command."""

    def __init__(self, config: Config, clock: Clock, prices: Prices, cluster: Cluster) -> None:
        self._config = config
        self._clock = clock
        self._prices = prices
        self._cluster = cluster
        self._thread = ThreadPoolExecutor(1, "scheduler")
        self._task: asyncio.Task[None] | None = None
        self._ordering = asyncio.Lock()

    async def open(self) -> None:
        """Connect and start the loop."""
        self._engine = await self._in_thread(
            storage.connect, self._config.scheduler_url, "scheduler"
        )
        self._task = asyncio.create_task(self._reconcile_forever())

    async def close(self) -> None:
        """Stop the loop and let go of the database."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._in_thread(self._engine.dispose)
        self._thread.shutdown()

    async def offer(self, offer: Offer) -> None:
        """Take an offer, or replace the one with the same id."""
        await self._command(lambda c: store.save_offer(c, offer))

    async def offers(self) -> list[Offer]:
        """All offers."""
        return list(await self._command(store.offers))

    async def deployments(self) -> list[Deployment]:
        """All deployments, oldest first."""
        return list(await self._command(store.deployments))

    async def deploy(
        self, model_name: str, mode: str, engine: str | None, replicas: int, dry_run: bool
    ) -> Deployment:
        """Make a model available; asking again for the same returns what is there.

        Raises InvalidRequest, NotFound, Conflict, or NoCapacity that says what is missing.
        """
        if mode != Mode.TOKENS:
            known = mode in set(Mode)
            raise InvalidRequest(
                f"mode {mode!r} is not available in this version yet; use --mode tokens"
                if known
                else f"mode {mode!r} is unknown; use --mode tokens",
                param="mode",
            )
        if not 1 <= replicas <= REPLICAS_MAX:
            raise InvalidRequest(f"replicas must be 1 to {REPLICAS_MAX}, got {replicas}")
        model = catalog.find(model_name)
        if await self._prices.rate_card(model.name) is None:
            raise InvalidRequest(f"model {model.name} has no price, so it cannot be served")
        async with self._ordering:
            return await self._order(model, engine, replicas, dry_run)

    async def _order(
        self, model: catalog.Model, engine: str | None, replicas: int, dry_run: bool
    ) -> Deployment:
        """One order at a time: two must not be given the same place."""
        current, offers = await self.deployments(), await self.offers()
        existing = [d for d in current if d.model == model.name]
        if existing:
            return _same_or_conflict(existing[0], engine, replicas)
        chosen = _place(model, replicas, offers, current)
        engine = engine or ("vllm" if chosen.gpu_milli else "transformers")
        await asyncio.to_thread(self._cluster.check, model, engine)
        deployment = Deployment(
            deployment_id=f"{model.name.replace('.', '-')}-{self._clock.now():%Y%m%d%H%M%S%f}",
            model=model.name,
            mode=Mode.TOKENS,
            engine=engine,
            replicas=replicas,
            offer_id=chosen.offer.offer_id,
            gpu_milli=chosen.gpu_milli,
            state=DeploymentState.STARTING,
            reason="replica starting",
            created_at=self._clock.now(),
        )
        if not dry_run:
            await self._command(lambda c: store.save_deployment(c, deployment))
        return deployment

    async def undeploy(self, model_name: str) -> Deployment:
        """Stop serving a model. Raises NotFound if it is not deployed."""
        for deployment in await self.deployments():
            if deployment.model == model_name:
                stopping = replace(deployment, state=DeploymentState.STOPPING, reason="draining")
                await self._command(partial(store.save_deployment, deployment=stopping))
                return stopping
        raise NotFound(
            f"model {model_name!r} is not deployed (market deployments)", code="model_not_found"
        )

    async def routes(self) -> RouteTable:
        """Where requests may go right now, and why some cannot."""
        offers = {offer.offer_id: offer for offer in await self.offers()}
        current = await self.deployments()
        known = {model.name for model in catalog.models()}
        ready = [d for d in current if d.state is DeploymentState.READY]
        others = [d for d in current if d.state is not DeploymentState.READY]
        return RouteTable(
            ready=tuple(self._route(d, offers[d.offer_id]) for d in ready if d.model in known),
            starting=tuple((d.model, f"{d.state}, {d.reason}") for d in others),
        )

    async def status(self) -> dict[str, Any]:
        """For people and tests."""
        return {"pid": os.getpid()}

    def _route(self, deployment: Deployment, offer: Offer) -> Route:
        model = catalog.find(deployment.model)
        return Route(
            model=model.name,
            lane=Lane.TOKENS,
            deployment_id=deployment.deployment_id,
            app_name=deployment.app_name,
            model_path=str(self._config.models_dir / model.name),
            max_context_tokens=model.served_context_tokens,
            provider_id=offer.provider_id,
            node_id=offer.node_id,
            gpu_type=offer.gpu_type,
            gpu_milli=deployment.gpu_milli,
        )

    async def _reconcile_forever(self) -> None:
        while True:
            try:
                await self._reconcile()
            except Exception:
                # The ledger's or Serve's controller may be away for a while.
                logger.exception("reconciling failed; the next round tries again")
            await asyncio.sleep(RECONCILE_S)

    async def _reconcile(self) -> None:
        desired = await self.deployments()
        offers = {offer.offer_id: offer for offer in await self.offers()}
        observed = await asyncio.to_thread(self._cluster.observe)
        for step in reconcile.plan(desired, observed):
            try:
                await self._perform(step, offers)
            except Exception:
                # One deployment that cannot be acted on must not starve the others.
                logger.exception("step failed, tried again next round: %s", step)

    async def _perform(self, step: reconcile.Step, offers: dict[str, Offer]) -> None:
        match step:
            case reconcile.Start(deployment):
                offer = offers[deployment.offer_id]
                await asyncio.to_thread(self._cluster.start, deployment, offer)
            case reconcile.Remove(app_name):
                await asyncio.to_thread(self._cluster.remove, app_name)
            case reconcile.Mark(deployment_id, state, reason):
                await self._command(
                    partial(store.mark, deployment_id=deployment_id, state=state, reason=reason)
                )
            case reconcile.Forget(deployment_id):
                await self._command(partial(store.forget, deployment_id=deployment_id))

    async def _command(self, command: storage.Command) -> Any:
        results = await self._in_thread(
            storage.run_group, self._engine, storage.Stateless(), [command]
        )
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _place(
    model: catalog.Model, replicas: int, offers: list[Offer], current: list[Deployment]
) -> placement.Placement:
    fitting = placement.that_fit(catalog.models(), offers, current)
    chosen = placement.place(model, offers, current, fitting, replicas)
    if isinstance(chosen, placement.Misfit):
        raise NoCapacity(chosen.reason)
    return chosen


def _same_or_conflict(existing: Deployment, engine: str | None, replicas: int) -> Deployment:
    if existing.state in (DeploymentState.STOPPING, DeploymentState.FAILED):
        raise Conflict(
            f"{existing.model} is {existing.state} ({existing.reason}); "
            f"run market undeploy {existing.model}, then deploy again"
        )
    if replicas != existing.replicas or engine not in (None, existing.engine):
        raise Conflict(
            f"{existing.model} is deployed with {existing.replicas} replica(s) of "
            f"{existing.engine}; run market undeploy {existing.model} first"
        )
    return existing
