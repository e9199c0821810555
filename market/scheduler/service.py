"""The scheduler service: every public coroutine is one command. It knows nothing of Ray.

Thin: ``orders`` and ``pools`` grant GPUs, ``rules`` deal requests, ``nodes`` knows who offers GPUs,
``keeper`` is the loop.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

from market import leases
from market.accounts import HoldResult
from market.catalog import Model
from market.config import Config
from market.errors import Conflict, InvalidRequest, NotFound, PermissionDenied
from market.leases import Event
from market.ports import Clock
from market.scheduler.core import Cluster, Core, LedgerPort, SendUsage
from market.scheduler.disks import Disks
from market.scheduler.elastic import Elastic
from market.scheduler.forecasts import Forecasts
from market.scheduler.keeper import Keeper
from market.scheduler.models import Models
from market.scheduler.nodes import Nodes, Proof
from market.scheduler.orders import Orders, Quote
from market.scheduler.pools import Pools
from market.scheduler.rules import Rules
from market.scheduler.shares import GatewayOrders, GatewayReport, Shares
from market.scheduler.spares import Spares
from market.scheduler.store import Store
from market.types import (
    Bounds,
    Deployment,
    DeploymentState,
    Lane,
    LanePolicy,
    Lease,
    LeaseState,
    Loan,
    Mode,
    NotReady,
    Offer,
    OfferState,
    Order,
    OrderState,
    Replica,
    ReplicaState,
    Route,
    RouteTable,
    SliceAsk,
    StoredModel,
)

logger = logging.getLogger(__name__)

CLOSED_SHOWN = 50
CALLS_AT_ONCE = 64
# Deployments that scale to zero are waited for in these states.
WAKING = (
    DeploymentState.COLD,
    DeploymentState.ASLEEP,
    DeploymentState.WAITING,
    DeploymentState.STARTING,
)


def exit_process() -> None:
    """End this process at once; Ray starts a new one, which recovers from SQL."""
    os._exit(70)


class Scheduler:
    """Start it with ``open``; every other public coroutine is one command."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        ledger: LedgerPort,
        cluster: Cluster,
        send: SendUsage,
        on_fatal: Callable[[], None] = exit_process,
    ) -> None:
        self._config = config
        self._clock = clock
        lock_file = config.state_dir / "scheduler.lock"
        self._store = Store(config.scheduler_url, lock_file, on_fatal)
        self._core = Core(config, clock, ledger, cluster, self._store)
        self._nodes = Nodes(self._core)
        self._orders = Orders(self._core)
        self._pools = Pools(self._core)
        self._rules = Rules(self._core)
        self._models = Models(self._core)
        self._shares = Shares(clock, ledger)
        self._forecasts = Forecasts(self._core)
        self._elastic = Elastic(self._core, self._pools, self._shares, self._forecasts)
        self._disks = Disks(self._core, self._pools, self._forecasts, self._elastic)
        self._keeper = Keeper(
            self._core,
            self._nodes,
            self._orders,
            self._pools,
            self._elastic,
            Spares(self._core, self._pools),
            send,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    async def open(self) -> None:
        """Lock, connect, load, and start the loop. Raises MarketFault; may be tried again."""
        await self._store.open()
        self._core.rebuild_calendar()
        # Nodes that do not answer must not keep others' calls waiting for a thread.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(CALLS_AT_ONCE))
        parts = self._disks, self._forecasts
        loops = self._keeper.run_forever(), *(part.watch_forever() for part in parts)
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def close(self) -> None:
        """Stop the loop, meter and send what there is, let go of the database."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._keeper.stop()
        await self._keeper.flush()
        await self._store.close()

    # -- supply ----------------------------------------------------------------------------

    async def offer(self, offer: Offer) -> None:
        """Take an offer of the operator's own, or change it."""
        await self._nodes.offer(offer)

    async def offers(self) -> list[Offer]:
        """All offers, by id."""
        return self._core.offers

    async def make_join_token(self, provider_id: str) -> str:
        """A token with which one node of the provider can join within the hour."""
        return await self._nodes.make_token(provider_id)

    async def join(self, offer: Offer, proof: Proof) -> str:
        """Take a node's offer; returns the node's key. Raises InvalidKey, Conflict."""
        return await self._nodes.join(offer, proof)

    async def drain(self, node_id: str, back: bool = False) -> Offer:
        """Match nothing more with a node, or again. Raises NotFound."""
        return await (self._nodes.undrain(node_id) if back else self._nodes.drain(node_id))

    async def require_node_key(self, node_id: str, node_key: str) -> Offer:
        """The offer of the node that has this key. Raises InvalidKey, NotFound."""
        return await self._nodes.require_key(node_id, node_key)

    async def leave(self, node_id: str, force: bool = False) -> Offer:
        """Take a node out for good.

        Raises Conflict while leases are on it; with ``force`` they are closed and the rest of
        their time is not charged. Pools' replicas go elsewhere if there is room.
        """
        offer = await self._nodes.drain(node_id)
        own = [v for v in self._core.open_leases() if v.offer_id == offer.offer_id]
        if own and not force:
            last = max(lease.end for lease in own)
            raise Conflict(
                f"{len(own)} lease(s) are on node {node_id}, the last until "
                f"{last:%Y-%m-%d %H:%M:%S} UTC; drain it and wait, or use --force, which ends "
                "them unpaid from now on"
            )
        for lease in own:
            sight = self._keeper.sight(lease)
            reason = f"node {node_id} left"
            await self._orders.close(lease.lease_id, Event.LEAVE, sight, reason)
        await self._pools.leave(offer)
        return await self._nodes.leave(node_id)

    # -- demand ----------------------------------------------------------------------------

    async def order(self, order: Order, queue: bool = False) -> Order:
        """Match an order for a lease. See Orders.place."""
        return await self._orders.place(order, queue)

    async def quote(self, order: Order) -> Quote:
        """What an order would get right now; changes nothing."""
        return await self._orders.quote(order)

    async def orders(self, tenant_id: str | None = None) -> list[Order]:
        """Orders that wait, then the last 50 refused; of one tenant or all, newest first."""
        own = [o for o in self._core.state.orders.values() if tenant_id in (None, o.tenant_id)]
        own.sort(key=lambda order: (order.created_at, order.order_id), reverse=True)
        refused = [order for order in own if order.state is OrderState.REFUSED]
        waiting = [order for order in own if order.state is OrderState.WAITING]
        return waiting + refused[:CLOSED_SHOWN]

    async def cancel_order(self, order_id: str, tenant_id: str | None) -> Order:
        """Take a waiting order back. Raises NotFound, Conflict."""
        return await self._orders.cancel(order_id, tenant_id)

    async def leases(
        self,
        tenant_id: str | None = None,
        closed: bool = False,
        provider_id: str | None = None,
    ) -> list[Lease]:
        """Leases of a tenant, on a provider's nodes, or all, oldest first.

        Of the closed ones the newest 50, if wanted.
        """
        own = [
            lease
            for lease in self._core.state.leases.values()
            if tenant_id in (None, lease.tenant_id) and provider_id in (None, lease.provider_id)
        ]
        own.sort(key=lambda lease: (lease.created_at, lease.lease_id))
        over = [v for v in own if v.state is LeaseState.CLOSED][-CLOSED_SHOWN:] if closed else []
        return [*over, *(v for v in own if v.state is not LeaseState.CLOSED)]

    async def lease(
        self, lease_id: str, tenant_id: str | None = None, provider_id: str | None = None
    ) -> Lease:
        """One lease. Raises NotFound, also if it is another's."""
        lease = self._core.state.leases.get(lease_id)
        strange = lease is not None and (
            tenant_id not in (None, lease.tenant_id) or provider_id not in (None, lease.provider_id)
        )
        if lease is None or strange:
            raise NotFound(f"no lease {lease_id!r} (market leases ls)", code="lease_not_found")
        return lease

    async def renew(self, lease_id: str, term_s: int, tenant_id: str | None = None) -> Lease:
        """Let a lease last longer at its price. Raises NotFound, Conflict."""
        await self.lease(lease_id, tenant_id)
        if term_s <= 0:
            raise InvalidRequest("term: how much longer, e.g. 7d", param="term")
        return await self._orders.renew(lease_id, timedelta(seconds=term_s))

    async def change_lease(
        self,
        lease_id: str,
        resale: bool | None,
        policy: Mapping[str, Any],
        tenant_id: str | None = None,
    ) -> Lease:
        """Sell a lease's idle time or not, and fields of a hybrid's policy. See Orders.change."""
        await self.lease(lease_id, tenant_id)
        return await self._orders.change(lease_id, resale, policy)

    async def release(self, lease_id: str, tenant_id: str | None = None) -> Lease:
        """End a lease now: nothing more is charged. Raises NotFound."""
        lease = await self.lease(lease_id, tenant_id)
        sight = self._keeper.sight(lease)
        reason = "released by its holder"
        return await self._orders.close(lease_id, Event.RELEASE, sight, reason)

    # -- what runs -------------------------------------------------------------------------

    async def open_pool(
        self, model: str, engine: str | None, bounds: Bounds, dry_run: bool
    ) -> tuple[Deployment, tuple[Replica, ...]]:
        """Sell a model's tokens to everybody. See Pools.open."""
        return await self._pools.open(model, engine, bounds, dry_run)

    async def open_auto(
        self, name: str, tenant_id: str, policy: LanePolicy, dry_run: bool = False
    ) -> Deployment:
        """Deal a tenant's requests for ``name`` by a policy; asked again, the policy is this one.

        See Rules.open.
        """
        return await self._rules.open(name, tenant_id, policy, dry_run)

    async def deployments(self) -> list[tuple[Deployment, tuple[Replica, ...]]]:
        """What should run with its replicas, oldest first."""
        known = sorted(
            self._core.state.deployments.values(), key=lambda d: (d.created_at, d.deployment_id)
        )
        return [(d, tuple(self._core.replicas_of(d.deployment_id))) for d in known]

    async def scaling(self) -> dict[str, str]:
        """Why each elastic pool has as many replicas as it has, by deployment."""
        return {
            name: self._elastic.reason(name)
            for name, deployment in self._core.state.deployments.items()
            if deployment.bounds.minimum != deployment.bounds.maximum
        }

    async def undeploy(self, name: str, tenant_id: str | None = None) -> Deployment:
        """Stop a deployment, named by id or model; a lease's is released.

        Raises NotFound; PermissionDenied if only the operator may; Conflict for an ambiguous name.
        """
        found = [
            d
            for d in self._core.state.deployments.values()
            if name in (d.deployment_id, d.model) and tenant_id in (None, d.tenant_id)
        ]
        pools = [d for d in found if d.mode is Mode.TOKENS]
        if tenant_id is None and pools and name != pools[0].deployment_id:
            found = pools
        if not found:
            others = any(d.model == name for d in self._core.state.deployments.values())
            if others and tenant_id is not None:
                raise PermissionDenied(f"model {name!r} is not deployed by you")
            raise NotFound(
                f"model {name!r} is not deployed (market deployments)", code="model_not_found"
            )
        if len(found) > 1:
            names = ", ".join(d.deployment_id for d in found)
            raise Conflict(f"{name} is deployed several times; say which: {names}")
        if found[0].lease_id is not None:
            await self.release(found[0].lease_id)
            return found[0]
        if found[0].mode is Mode.AUTO:
            return await self._rules.close(found[0])
        return await self._pools.close(found[0])

    # -- the catalog, and models on disks --------------------------------------------------

    async def models(self) -> tuple[Model, ...]:
        """The catalog: shipped models, then those that were added."""
        return self._core.models()

    async def model(self, name: str) -> Model:
        """An entry of the catalog. Raises NotFound."""
        return self._core.find(name)

    async def add_model(self, model: Model) -> Model:
        """Add an entry to the catalog. See Models.add."""
        return await self._models.add(model)

    async def forget_model(self, name: str) -> Model:
        """Take an added entry out of the catalog. See Models.forget."""
        return await self._models.forget(name)

    async def stored_models(self) -> dict[str, tuple[StoredModel, ...]]:
        """What is on the disks of all nodes that answer, by node."""
        return await self._disks.stored()

    async def pull_model(self, name: str, nodes: Sequence[str], pin: bool | None) -> list[str]:
        """Begin to pull a model to nodes, or to all that are open. See Disks.pull."""
        return await self._disks.pull(name, nodes, pin)

    async def remove_model(self, name: str, nodes: Sequence[str]) -> dict[str, int]:
        """Remove a model from nodes, or from all. See Disks.remove."""
        return await self._disks.remove(name, nodes)

    # -- gateways --------------------------------------------------------------------------

    async def routes(self) -> RouteTable:
        """Where requests may go right now, and why some cannot."""
        known = {model.name for model in self._core.models()}
        ready: list[Route] = []
        early: list[Route] = []
        starting: list[NotReady] = []
        for deployment, replicas in await self.deployments():
            if deployment.mode is Mode.AUTO:
                continue
            lease = self._core.state.leases.get(deployment.lease_id or "")
            serving = [r for r in replicas if r.state is ReplicaState.READY]
            if lease is not None and self._clock.now() >= leases.drains_from(lease):
                reason = f"lease {lease.lease_id} ends at {lease.end:%H:%M:%S} UTC and drains"
                starting.append(
                    NotReady(
                        deployment.model, deployment.deployment_id, deployment.tenant_id, reason
                    )
                )
            elif serving and deployment.model in known:
                ready.extend(self._route(deployment, replica) for replica in serving)
            else:
                state, why = deployment_state(deployment, replicas)
                stuck = self._elastic.stuck(deployment.deployment_id)
                starting.append(
                    NotReady(
                        deployment.model,
                        deployment.deployment_id,
                        deployment.tenant_id,
                        stuck or f"{state}, {why}",
                        wakes=deployment.bounds.minimum == 0 and state in WAKING and not stuck,
                    )
                )
            if lease is None and deployment.model in known:
                early.extend(
                    self._route(deployment, replica)
                    for replica in replicas
                    if replica.state is ReplicaState.STARTING
                    and self._elastic.starts_in_process(replica)
                )
        return RouteTable(
            tuple(ready),
            tuple(starting),
            self._rules.all(),
            lent=self._lent(ready),
            early=tuple(early),
            standby=self._keeper.standby(),
        )

    async def grant(self, ask: SliceAsk) -> HoldResult:
        """Open or grow a gateway's token slice. See Shares.grant."""
        return await self._shares.grant(ask)

    async def sync(self, report: GatewayReport) -> GatewayOrders:
        """What a gateway says of itself, and what it must know."""
        if report.cold:
            self._keeper.hurry()
        told = self._shares.sync(report, await self.routes())
        return replace(told, models=tuple(self._core.state.models.values()))

    async def status(self) -> dict[str, Any]:
        """For people and tests. ``start_s``: how long starts took, by what there was before."""
        state = self._core.state
        return {
            "pid": os.getpid(),
            "unsent_segments": len(state.outbox),
            "lost_nodes": sum(o.state is OfferState.LOST for o in state.offers.values()),
            "spares_ready": len(self._keeper.spares_ready()),
            "start_s": {name: round(cost.seconds, 3) for name, cost in state.starts.items()},
        }

    def _lent(self, ready: Sequence[Route]) -> tuple[Route, ...]:
        """Leases' replicas whose holders let idle time be sold, as their model's pool's."""
        pools = {
            deployment.model: deployment
            for deployment in self._core.state.deployments.values()
            if deployment.mode is Mode.TOKENS and not deployment.stopping
        }
        leases = self._core.state.leases
        return tuple(
            replace(
                route,
                lane=Lane.TOKENS,
                deployment_id=pools[route.model].deployment_id,
                tenant_id=None,
                lease_id=None,
                loan=Loan(route.lease_id, leases[route.lease_id].tenant_id),
            )
            for route in ready
            if route.lease_id in leases
            and leases[route.lease_id].resale
            and route.model in pools
            # Else what the one takes the other may refuse, in the middle of an answer.
            and pools[route.model].engine == leases[route.lease_id].engine
        )

    def _route(self, deployment: Deployment, replica: Replica) -> Route:
        model = self._core.find(deployment.model)
        offer = self._core.state.offers[replica.place.offer_id]
        return Route(
            model=model.name,
            lane=Lane.TOKENS if deployment.lease_id is None else Lane.LEASE,
            deployment_id=deployment.deployment_id,
            app_name=replica.app_name,
            max_context_tokens=model.served_context_tokens,
            provider_id=offer.provider_id,
            node_id=offer.node_id,
            gpu_type=offer.gpu_type,
            gpu_milli=replica.place.gpu_milli * len(replica.place.gpu_indices),
            tenant_id=deployment.tenant_id,
            lease_id=deployment.lease_id,
            places=self._config.sequences,
            embeds=model.embeds,
            reasoning_parser=model.reasoning_parser,
        )


def deployment_state(
    deployment: Deployment, replicas: tuple[Replica, ...]
) -> tuple[DeploymentState, str]:
    """What a deployment's replicas amount to, and why: the best of them speaks for it."""
    if deployment.stopping:
        return DeploymentState.STOPPING, "draining"
    order = (
        (ReplicaState.READY, DeploymentState.READY),
        (ReplicaState.STARTING, DeploymentState.STARTING),
        (ReplicaState.WAITING, DeploymentState.WAITING),
        (ReplicaState.ASLEEP, DeploymentState.ASLEEP),
        (ReplicaState.FAILED, DeploymentState.FAILED),
    )
    for seen, state in order:
        found = [replica for replica in replicas if replica.state is seen]
        if found:
            return state, found[0].reason
    if deployment.mode is Mode.AUTO:
        return DeploymentState.READY, "requests are dealt"
    if deployment.lease_id is not None:
        return DeploymentState.WAITING, "booked for later"
    if deployment.bounds.minimum == 0:
        return DeploymentState.COLD, "scaled to zero; the next request starts it"
    return DeploymentState.WAITING, "no replica yet"
