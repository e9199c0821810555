"""The loop: look at the cluster, advance leases, match what waits, reconcile, send what is metered.

Each part may fail alone; the next round tries again. Nothing here is in a request's path.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

from market import crash
from market import leases as rules
from market.errors import MarketError
from market.leases import Event, Sight
from market.leasing import PRODUCER
from market.matching import micros
from market.scheduler import reconcile
from market.scheduler.core import Core, SendUsage
from market.scheduler.elastic import Elastic
from market.scheduler.nodes import Nodes
from market.scheduler.orders import Orders
from market.scheduler.pools import Pools
from market.scheduler.reconcile import Seen
from market.scheduler.spares import Spares
from market.types import (
    AppStatus,
    ClusterView,
    Deployment,
    Lease,
    LeaseState,
    Offer,
    OfferState,
    Replica,
    ReplicaState,
    app_name,
)

logger = logging.getLogger(__name__)

ROUND_S = 0.5
# Rounds follow each other as fast as this while somebody waits for a model to start.
HURRY_S = 0.1
LOOK_TIMEOUT_S = 10.0
# A round waits so long for what nodes say; one that says nothing is asked again after a while.
ANSWER_PATIENCE_S = 1.0
SILENT_RETRY_S = 15.0
FUNDS_RETRY_S = 2.0
SEND_MAX = 1024
REJOIN_S = 90.0
SEND_PATIENCE_S = 5.0
TIDY_S = 60.0
SERVING = (ReplicaState.STARTING, ReplicaState.READY)
NOT_ON_GPUS = (ReplicaState.WAITING, ReplicaState.FREEING)
# What an engine that sleeps keeps of a card: its context. Not measured yet.
ASLEEP_MILLI = 15


class Keeper:
    """Keeps the cluster as it should be. What it remembers itself may be lost at any time."""

    def __init__(
        self,
        core: Core,
        nodes: Nodes,
        orders: Orders,
        pools: Pools,
        elastic: Elastic,
        spares: Spares,
        send: SendUsage,
    ) -> None:
        self._core = core
        self._nodes = nodes
        self._orders = orders
        self._pools = pools
        self._elastic = elastic
        self._spares = spares
        self._send = send
        self._hurry = asyncio.Event()
        self._view: ClusterView | None = None
        self._viewed_at: datetime | None = None
        self._seen_runs: dict[str, datetime] = {}
        self._lost_since_s: dict[str, float] = {}
        self._asked_funds_s: dict[str, float] = {}
        self._working: dict[str, asyncio.Task[None]] = {}
        self._sending: asyncio.Task[None] | None = None
        self._swept: set[str] = set()
        self._nodes_seen: set[str] = set()
        self._asking: dict[str, tuple[asyncio.Task[Any], set[str]]] = {}
        self._silent_s: dict[str, float] = {}
        self._tidied_s = float("-inf")

    async def run_forever(self) -> None:
        """Rounds, until cancelled."""
        while True:
            self._hurry.clear()
            await self.round()
            await asyncio.sleep(HURRY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROUND_S - HURRY_S):
                    await self._hurry.wait()

    def hurry(self) -> None:
        """Somebody waits: let the next round begin at once."""
        self._hurry.set()

    async def round(self) -> None:
        """One round; what fails is logged and tried again in the next."""
        await self._guard("tidying", self._tidy)
        view = await self._guard("looking at the cluster", self._look)
        now = self._core.clock.now()
        if view is not None:
            await self._guard("advancing leases", partial(self._advance, view, now))
            await self._guard("scaling pools", self._elastic.round)
            await self._guard("keeping spare processes", partial(self._keep_spares, view))
            await self._guard("reconciling", partial(self._reconcile, view, now))
        await self._send_for_a_while()
        await self._guard("holding money", partial(self._hold, now))

    async def flush(self) -> None:
        """Meter and send what there is: the scheduler is going down in good order."""
        view = await self._guard("looking at the cluster", self._look)
        if view is not None:
            now = self._core.clock.now()
            async with self._core.lock:
                for lease in self._core.open_leases():
                    sight = self.sight(lease, view)
                    if lease.hold_index >= 0 and sight.run == lease.run_replica is not None:
                        await self._core.leasing.pause(lease.lease_id, now, sight)
        await self._send_for_a_while()

    async def stop(self) -> None:
        """End what is under way."""
        tasks = [*self._working.values(), *(task for task, _ in self._asking.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def sight(self, lease: Lease, view: ClusterView | None = None) -> Sight:
        """What is seen of a lease's replica, now or in the last view."""
        at = self._viewed_at if view is None else None
        view = view or self._view
        lost = self._core.state.offers[lease.offer_id].state is OfferState.LOST
        last = self._seen_runs.get(lease.lease_id)
        if view is None:
            return Sight(None, last, lost)
        for replica in self._core.replicas_of(lease.lease_id):
            app = view.apps.get(replica.app_name)
            if replica.state in SERVING and app is not None and not lost:
                return Sight(app.run, last, lost, at)
        return Sight(None, last, lost)

    def spares_ready(self) -> list[str]:
        """Applications of processes that wait for a model."""
        apps = {} if self._view is None else self._view.apps
        names = [app_name(spare.process) for spare in self._core.spares.values()]
        return [name for name in names if name in apps and _is_there(apps[name])]

    def standby(self) -> tuple[str, ...]:
        """Applications of processes that could serve next: spare ones, and those that sleep."""
        replicas = self._core.state.replicas.values()
        asleep = [r.app_name for r in replicas if r.state is ReplicaState.ASLEEP]
        return (*self.spares_ready(), *asleep)

    # -- parts of a round --------------------------------------------------------------------

    async def _tidy(self) -> None:
        """First and every minute: holds of which a crash or a lost answer kept us from knowing."""
        clock_s = self._core.clock.monotonic()
        if clock_s - self._tidied_s >= TIDY_S:
            async with self._core.lock:
                await self._core.register()
                await self._core.leasing.end_strangers()
                self._core.calendar.expire(micros(self._core.clock.now()))
            self._tidied_s = clock_s

    async def _look(self) -> ClusterView:
        async with asyncio.timeout(LOOK_TIMEOUT_S):
            view = await asyncio.to_thread(self._core.cluster.look)
        async with self._core.lock:
            await self._nodes.see(view.nodes)
        self._view, self._viewed_at = view, self._core.clock.now()
        self._nodes_seen |= view.nodes
        return view

    async def _advance(self, view: ClusterView, now: datetime) -> None:
        async with self._core.lock:
            # The calendar binds in the order of starts.
            for lease in sorted(self._core.open_leases(), key=lambda lease: lease.start):
                await self._guard(lease.lease_id, partial(self._lease, lease, view, now))
            for lease in list(self._core.state.leases.values()):
                if lease.state is LeaseState.CLOSED:
                    await self._stop_replicas(lease, f"lease {lease.close_reason}")
            await self._lost(now)
            await self._orders.retry(now)

    async def _lease(self, lease: Lease, view: ClusterView, now: datetime) -> None:
        if lease.floating and not lease.gpu_indices and lease.start <= now < lease.end:
            lease = await self._orders.bind(lease)
        if now < rules.stops_at(lease) and self._is_unsure(lease, view):
            return  # what was between is decided when Serve knows
        sight = self.sight(lease, view)
        failed = [
            r for r in self._core.replicas_of(lease.lease_id) if r.state is ReplicaState.FAILED
        ]
        if failed:
            reason = f"the replica failed: {failed[0].reason}"
            await self._orders.close_locked(lease.lease_id, Event.FAIL, sight, reason)
            return
        await self._core.leasing.advance(lease.lease_id, now, sight)
        lease = self._core.state.leases[lease.lease_id]
        if sight.run is not None and lease.run_replica == sight.run:
            self._seen_runs[lease.lease_id] = now
        if lease.state is LeaseState.CLOSED:
            self._core.unbook(lease.lease_id, now)
            self._seen_runs.pop(lease.lease_id, None)
        elif now >= rules.stops_at(lease):
            await self._stop_replicas(lease, "its term is over")

    def _is_unsure(self, lease: Lease, view: ClusterView) -> bool:
        """Whether its replica served, and Serve has not found out yet whether it still does."""
        serving = [r for r in self._core.replicas_of(lease.lease_id) if r.state in SERVING]
        apps = [view.apps.get(replica.app_name) for replica in serving]
        return any(app is not None and app.run is None and app.unsure for app in apps)

    async def _stop_replicas(self, lease: Lease, reason: str) -> None:
        stopping = [
            replace(replica, state=ReplicaState.STOPPING, reason=reason)
            for replica in self._core.running(lease.lease_id)
        ]
        deployment = self._core.state.deployments.get(lease.lease_id)
        if stopping or (deployment is not None and not deployment.stopping):
            kept = [] if deployment is None else [replace(deployment, stopping=True)]
            await self._core.store.save([*stopping, *kept])

    async def _lost(self, now: datetime) -> None:
        """After a while, move what runs on a lost node; close what cannot move. Under the lock."""
        clock_s = self._core.clock.monotonic()
        for offer in self._core.offers:
            if offer.state is not OfferState.LOST:
                self._lost_since_s.pop(offer.offer_id, None)
                continue
            since_s = self._lost_since_s.setdefault(offer.offer_id, clock_s)
            self._swept.discard(offer.node_id)
            if clock_s - since_s < self._patience_s(offer.node_id):
                continue
            reason = f"node {offer.node_id} was lost"
            for lease in self._core.open_leases():
                begun = lease.offer_id == offer.offer_id and now >= lease.start
                if begun and await self._orders.move(lease, reason) is None:
                    sight = self.sight(lease)
                    await self._orders.close_locked(lease.lease_id, Event.LOSE_NODE, sight, reason)
            for replica in self._pool_replicas_on(offer.offer_id):
                await self._pools.replace_lost(replica, reason)

    def _patience_s(self, node_id: str) -> float:
        """How long a node may be lost; longer if it is about to join a market just started."""
        patience_s = self._core.config.node_patience_s
        return patience_s if node_id in self._nodes_seen else max(patience_s, REJOIN_S)

    def _pool_replicas_on(self, offer_id: str) -> list[Replica]:
        state = self._core.state
        return [
            replica
            for deployment in state.deployments.values()
            if deployment.lease_id is None
            for replica in self._core.running(deployment.deployment_id)
            if replica.place.offer_id == offer_id
        ]

    async def _hold(self, now: datetime) -> None:
        """Money for the next hour; what is left of the last one returns."""
        async with self._core.lock:
            for lease in list(self._core.state.leases.values()):
                if rules.is_over(lease):
                    continue
                name = lease.lease_id
                await self._guard(name, partial(self._core.leasing.end_finished, name))
                clock_s = self._core.clock.monotonic()
                asked_s = self._asked_funds_s.get(name, float("-inf"))
                if clock_s - asked_s >= FUNDS_RETRY_S and rules.next_hold(lease, now) is not None:
                    self._asked_funds_s[name] = clock_s
                    await self._guard(name, partial(self._core.leasing.hold_ahead, name, now))

    async def _keep_spares(self, view: ClusterView) -> None:
        async with self._core.lock:
            for spare in self._spares.keep(view):
                offer = self._core.state.offers[spare.offer_id]
                self._work(spare.process, self._core.cluster.start_spare, spare, offer)

    async def _send_for_a_while(self) -> None:
        """Sending goes on beside the rounds while the ledger is away: leases must not wait."""
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._guard("sending segments", self.send))
        await asyncio.wait({self._sending}, timeout=SEND_PATIENCE_S)

    async def send(self) -> None:
        """Bring metered segments to the ledger, in their order, once each."""
        while self._core.state.outbox and self._core.state.epoch:
            outbox = self._core.state.outbox
            seqs = sorted(outbox)[:SEND_MAX]
            batch = [outbox[seq][1] for seq in seqs]
            await self._send((PRODUCER, self._core.state.epoch), seqs[0], batch)
            crash.reach("segments-sent")
            await self._core.store.sent(seqs[-1] + 1)

    # -- replicas ------------------------------------------------------------------------------

    async def _reconcile(self, view: ClusterView, now: datetime) -> None:
        residents, memory = await self._ask_nodes()
        async with self._core.lock:
            state = self._core.state
            starts = {
                replica.replica_id: state.leases[replica.deployment_id].start
                for replica in state.replicas.values()
                if replica.deployment_id in state.leases
            }
            seen = Seen(view.apps, residents, memory)
            spares = self._core.spares.values()
            steps = reconcile.plan(state.replicas.values(), state.offers, starts, seen, now, spares)
            decided = [step for step in steps if await self._decide(step, view)]
            await self._forget_deployments()
        crash.reach("steps-decided")
        for step in decided:
            self._act(step)

    async def _ask_nodes(self) -> tuple[dict[str, frozenset[str]], frozenset[tuple[str, int]]]:
        """Processes and memory of nodes where a GPU is being freed, or that have come back."""
        freeing = [r for r in self._core.state.replicas.values() if r.state is ReplicaState.FREEING]
        offers = [o for o in self._core.offers if o.state in (OfferState.OPEN, OfferState.DRAINING)]
        alive = {o.node_id for o in offers}
        nodes = {r.place.node_id for r in freeing} | alive - self._swept
        clock_s = self._core.clock.monotonic()
        self._silent_s = {n: s for n, s in self._silent_s.items() if clock_s - s < SILENT_RETRY_S}
        fresh = []
        for node_id in sorted(nodes & alive - self._asking.keys() - self._silent_s.keys()):
            here = [replica for replica in freeing if replica.place.node_id == node_id]
            task = asyncio.create_task(self._ask_node(node_id, here))
            self._asking[node_id] = task, {replica.replica_id for replica in here}
            fresh.append(task)
        if fresh:
            await asyncio.wait(fresh, timeout=ANSWER_PATIENCE_S)
        residents: dict[str, frozenset[str]] = {}
        taken: set[tuple[str, int]] = set()
        for node_id, (task, asked) in list(self._asking.items()):
            if not task.done():
                continue  # what it says counts in a later round
            del self._asking[node_id]
            answer = task.result()
            if answer is None:
                self._silent_s[node_id] = clock_s
            elif asked.issuperset(r.replica_id for r in freeing if r.place.node_id == node_id):
                residents[node_id] = answer[0]
                taken.update((node_id, index) for index in answer[1])
                self._swept.add(node_id)
        return residents, frozenset(taken)

    async def _ask_node(
        self, node_id: str, freeing: Sequence[Replica]
    ) -> tuple[frozenset[str], frozenset[int]] | None:
        """The replicas with processes there, and the GPUs being freed that are in use."""
        others, cluster = self._others_milli(node_id), self._core.cluster
        gpus = {index: others.get(index, 0) for r in freeing for index in r.place.gpu_indices}
        try:
            found = await asyncio.to_thread(cluster.residents, node_id)
            return found, await asyncio.to_thread(cluster.memory_taken, node_id, gpus)
        except MarketError as error:
            logger.warning("node %s: %s", node_id, error.message)
            return None

    def _others_milli(self, node_id: str) -> dict[int, int]:
        """Shares of a node's GPUs that running replicas may use."""
        used: dict[int, int] = {}
        for replica in self._core.state.replicas.values():
            milli = replica.place.gpu_milli
            if replica.state is ReplicaState.ASLEEP:
                milli = min(milli, ASLEEP_MILLI)
            if replica.place.node_id == node_id and replica.state not in NOT_ON_GPUS:
                for index in replica.place.gpu_indices:
                    used[index] = used.get(index, 0) + milli
        return used

    async def _decide(self, step: reconcile.Step, view: ClusterView) -> bool:
        """Remember it; whether there is something to do about it now."""
        state = self._core.state
        match step:
            case reconcile.Mark(replica_id, to, reason):
                marked = replace(state.replicas[replica_id], state=to, reason=reason)
                await self._core.store.save([marked])
                if to is ReplicaState.ASLEEP:
                    self._core.unbook(replica_id, self._core.clock.now())
            case reconcile.Start(replica) if replica.app_name not in view.apps:
                known = state.replicas[replica.replica_id]
                given = self._spares.give(known, view)
                if given is not None:
                    await self._core.store.save([given])
                    del self._core.spares[given.process]
                elif self._spares.is_coming(known, view):
                    return False
            case reconcile.Forget(replica_id):
                await self._core.store.save(gone=[state.replicas[replica_id]])
                self._core.unbook(replica_id, self._core.clock.now())
            case _:
                pass
        return True

    async def _forget_deployments(self) -> None:
        """A deployment that is being removed is gone with its last replica."""
        core = self._core
        known = core.state.deployments.values()
        over = [d for d in known if d.stopping and not core.replicas_of(d.deployment_id)]
        if over:
            await self._core.store.save(gone=over)

    def _act(self, step: reconcile.Step) -> None:
        """Do what takes time beside the loop, one thing per replica at once."""
        cluster, state = self._core.cluster, self._core.state
        match step:
            case reconcile.Start(replica):
                deployment = state.deployments.get(replica.deployment_id)
                if deployment is not None:
                    replica = state.replicas[replica.replica_id]
                    offer = state.offers[replica.place.offer_id]
                    self._work(replica.app_name, self._start, replica, deployment, offer)
            case reconcile.Remove(app_name):
                self._work(app_name, cluster.remove, app_name)
            case reconcile.End(process_id, node_id):
                self._swept.discard(node_id)
                self._work(process_id, cluster.end, process_id, node_id)
            case _:
                pass

    def _start(self, replica: Replica, deployment: Deployment, offer: Offer) -> None:
        model = self._core.find(deployment.model)
        self._core.cluster.start(replica, deployment, model, offer)

    def _work(self, name: str, function: Callable[..., None], *arguments: Any) -> None:
        if name in self._working:
            return

        async def work() -> None:
            try:
                await asyncio.to_thread(function, *arguments)
                crash.reach("step-done")
            except Exception:
                logger.exception("%s of %s failed, tried again", function.__name__, name)
            finally:
                del self._working[name]

        self._working[name] = asyncio.create_task(work())

    async def _guard(self, what: str, part: Callable[[], Awaitable[Any]]) -> Any:
        """One lease or part that fails must not stop the others."""
        try:
            return await part()
        except Exception as error:
            if isinstance(error, MarketError | TimeoutError):
                logger.warning("%s: %s", what, error)
            else:
                logger.exception("%s failed; the next round tries again", what)
            return None


def _is_there(app: AppStatus) -> bool:
    return app.run is not None or app.unsure
