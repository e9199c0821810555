"""Pools grow, shrink, sleep and wake: autoscaling.py decides, this applies it, a step a round.

What goes falls asleep, if its engine can (vLLM on GPUs): the process and, in the host's memory, its
weights are kept, its GPU is free. It is given up for good when that has cost what a start does.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from market import autoscaling, matching
from market.autoscaling import Busy, Costs, Decision, Idler, Memory, Signal, Snapshot
from market.calendar import Oversubscribed
from market.errors import MarketError
from market.matching import Misfit
from market.scheduler.core import Core
from market.scheduler.forecasts import Forecasts
from market.scheduler.pools import Pools
from market.scheduler.shares import Shares
from market.scheduler.starts import Starts
from market.types import Deployment, Mode, Offer, Replica, ReplicaState

logger = logging.getLogger(__name__)

MIB = 1024 * 1024

# On one GPU; each keeps a little of its memory.
SLEEPERS_MAX = 4
# Of a node's memory, what replicas that sleep may have in all.
ASLEEP_MEMORY = 0.5
# A replica that has just started for somebody is about to be asked, though no report says so yet.
EVICT_AFTER_S = 3.0
# Whose replica made room for somebody does not start another ahead of need for so long.
EVICTED_S = 600.0
# What leaves makes room soon; what has not left by then is not waited for.
LEAVES_S = 15.0
# A replica that failed keeps its place, so that none is tried there, for so long.
FAILED_S = 600.0
# Who waits for what cannot start is told after so long, and those who come within it, at once.
STUCK_S = 30.0

SERVING = (ReplicaState.READY, ReplicaState.STARTING, ReplicaState.WAITING)
LEAVING = (
    ReplicaState.DRAINING,
    ReplicaState.FALLING_ASLEEP,
    ReplicaState.STOPPING,
    ReplicaState.FREEING,
)


@dataclass(frozen=True, slots=True)
class Stuck:
    """A pool that is asked for and can have no replica: since when, when last, and why."""

    since_s: float
    last_s: float
    reason: str


class Elastic:
    """Applies one decision per pool and round. Everything under the core's lock."""

    def __init__(self, core: Core, pools: Pools, shares: Shares, forecasts: Forecasts) -> None:
        self._core = core
        self._pools = pools
        self._shares = shares
        self._forecasts = forecasts
        self._starts = Starts(core, pools)
        self._memories: dict[str, Memory] = {}
        self._draining_since_s: dict[str, float] = {}
        self._leaving_since_s: dict[str, float] = {}
        self._asleep_since_s: dict[str, float] = {}
        self._failed_since_s: dict[str, float] = {}
        self._evicted_s: dict[str, float] = {}
        self._stuck: dict[str, Stuck] = {}

    async def round(self) -> None:
        """Bring every pool a step closer to what it needs."""
        async with self._core.lock:
            await self._starts.measure()
            await self._end_drained()
            await self._end_sleepers()
            await self._end_failed()
            pools = self._core.pools
            for gone in self._memories.keys() - {pool.deployment_id for pool in pools}:
                del self._memories[gone]
                self._evicted_s.pop(gone, None)
                self._stuck.pop(gone, None)
            for deployment in pools:
                await self._scale_guarded(deployment)

    def reason(self, deployment_id: str) -> str:
        """Why a pool has as many replicas as it has."""
        memory = self._memories.get(deployment_id)
        return "" if memory is None or memory.decision is None else memory.decision.reason

    def stuck(self, deployment_id: str) -> str:
        """Why nobody need wait for a pool's first replica; empty if it may come."""
        stuck, now_s = self._stuck.get(deployment_id), self._core.clock.monotonic()
        if stuck is None or not stuck.last_s - stuck.since_s >= STUCK_S > now_s - stuck.last_s:
            return ""
        return stuck.reason

    def starts_in_process(self, replica: Replica) -> bool:
        """See Starts.in_process."""
        return self._starts.in_process(replica)

    # -- one pool ------------------------------------------------------------------------------

    async def _scale_guarded(self, deployment: Deployment) -> None:
        """One pool that cannot be scaled must not keep the others from it."""
        try:
            await self._scale(deployment)
        except MarketError as error:
            logger.warning("scaling %s: %s", deployment.model, error)
        except Exception:
            logger.exception("scaling %s failed; the next round tries again", deployment.model)

    async def _scale(self, deployment: Deployment) -> None:
        replicas = self._core.replicas_of(deployment.deployment_id)
        present = [r for r in replicas if r.state in SERVING]
        failed = [r for r in replicas if r.state is ReplicaState.FAILED]
        asleep = [r for r in replicas if r.state is ReplicaState.ASLEEP]
        decision = self._decide(deployment, present)
        if decision.replicas > len(present):
            # If more fail than serve it is not their places' fault.
            if len(failed) <= len(present) + len(asleep) or not failed:
                asked = decision.signal is not Signal.FORECAST
                await self._grow(deployment, decision.replicas - len(present), makes_room=asked)
        elif decision.replicas < len(present) and self._shares.heard:
            await self._shrink(present, len(present) - decision.replicas, decision)
        if decision.signal is Signal.BUDGET and not (present or decision.replicas):
            self._is_stuck(deployment, decision.reason)

    def _decide(self, deployment: Deployment, present: list[Replica]) -> Decision:
        core = self._core
        now_s = core.clock.monotonic()
        memory = self._memories.setdefault(deployment.deployment_id, Memory(now_s))
        apps = [r.app_name for r in present if r.state is ReplicaState.READY]
        demand = self._shares.demand(deployment.model, apps, self._lent(deployment.model))
        costs = self._starts.costs(deployment, present)
        pool = Snapshot(
            bounds=deployment.bounds,
            costs=costs,
            demand=demand,
            places=core.config.sequences,
            replicas=len(present),
            serving=len(apps),
            hours_pico=tuple(core.hour_pico(replica.place) for replica in present),
            next_pico=self._next_pico(deployment),
            speed=memory.speed,
            stretch=self._forecasts.stretch(deployment.model, deployment.bounds, costs),
            ahead=self._ahead(deployment, now_s - memory.used_s, costs, bool(present)),
        )
        return memory.decide(pool, now_s)

    def _next_pico(self, deployment: Deployment) -> int | None:
        """What an hour of its next replica costs, if that matters."""
        if deployment.bounds.spend_max_pico is None:
            return None
        following = self._pools.next_places(self._core.find(deployment.model))
        return self._core.hour_pico(following[0]) if following else None

    def _ahead(self, deployment: Deployment, idle_s: float, costs: Costs, is_there: bool) -> int:
        """What the time of day asks for; nothing for who has just made room for somebody."""
        evicted_s = self._evicted_s.get(deployment.deployment_id, float("-inf"))
        if self._core.clock.monotonic() - evicted_s < EVICTED_S:
            return 0
        replicas = self._core.replicas_of(deployment.deployment_id)
        if not any(replica.state is ReplicaState.ASLEEP for replica in replicas):
            costs = replace(costs, wake_s=None)  # a start is what there is to be ahead of
        return self._forecasts.ahead(deployment.model, idle_s, costs, is_there=is_there)

    def _lent(self, model: str) -> list[str]:
        """Applications of leases' replicas that serve the model's pool while idle."""
        return [
            replica.app_name
            for lease in self._core.lent(model)
            for replica in self._core.replicas_of(lease.lease_id)
        ]

    async def _grow(self, deployment: Deployment, count: int, *, makes_room: bool) -> None:
        """Take back what drains, then wake what sleeps, then start anew, or make room."""
        replicas = self._core.replicas_of(deployment.deployment_id)
        draining = [r for r in replicas if r.state is ReplicaState.DRAINING]
        back = [replace(r, state=ReplicaState.READY, reason="serving") for r in draining[:count]]
        for replica in back:
            self._draining_since_s.pop(replica.replica_id, None)
        if back:
            await self._core.store.save(back)
        asleep = [r for r in replicas if r.state is ReplicaState.ASLEEP]
        woken = await self._wake(asleep, count - len(back))
        # Who falls asleep is woken as soon as it sleeps.
        falling = sum(replica.state is ReplicaState.FALLING_ASLEEP for replica in replicas)
        for number in range(count - len(back) - woken - falling):
            if number and deployment.bounds.spend_max_pico is not None:
                return  # the next one's place may cost more: the next round knows
            misfit = await self._pools.add_replica(deployment.deployment_id)
            if misfit is not None:
                if makes_room:  # for who asks, not for who is only expected
                    await self._make_room(deployment, misfit)
                return

    async def _shrink(self, present: list[Replica], count: int, decision: Decision) -> None:
        busy = [
            Busy(
                r.replica_id,
                self._shares.streams(r.app_name),
                self._serves(r),
                r.created_at.timestamp(),
                self._core.hour_pico(r.place),
            )
            for r in present
        ]
        dearest = decision.signal is Signal.BUDGET
        await self._drain(autoscaling.to_drain(busy, count, dearest=dearest), decision.reason)

    async def _wake(self, asleep: list[Replica], count: int) -> int:
        """Put so many of these on their GPUs again, as far as those have room; how many."""
        woken = 0
        for replica in asleep:
            if woken == count:
                break
            if not self._takes_pools(replica):
                continue
            back = replace(replica, state=ReplicaState.STARTING, reason="waking up")
            try:
                await self._core.grant([back])
            except Oversubscribed:
                continue
            self._starts.wakes(replica)
            woken += 1
        return woken

    async def _drain(self, names: Iterable[str], reason: str) -> None:
        state, now_s = self._core.state, self._core.clock.monotonic()
        changed = []
        for name in names:
            replica = state.replicas[name]
            # What does not serve yet has nothing to end.
            to = ReplicaState.DRAINING if self._serves(replica) else ReplicaState.STOPPING
            changed.append(replace(replica, state=to, reason=reason))
            self._draining_since_s[name] = now_s
        await self._core.store.save(changed)

    def _serves(self, replica: Replica) -> bool:
        """Gateways may use one that starts before we see it ready."""
        is_ready = replica.state is ReplicaState.READY
        return is_ready or self._shares.streams(replica.app_name) > 0

    async def _end_drained(self) -> None:
        """Stop what drains, or put it to sleep, as soon as nobody uses it: a stream keeps it."""
        now_s = self._core.clock.monotonic()
        draining = self._core.in_state(ReplicaState.DRAINING)
        self._draining_since_s = _kept(self._draining_since_s, draining, now_s)
        for replica in draining:
            since_s = self._draining_since_s[replica.replica_id]
            if self._shares.heard and self._shares.is_quiet(replica.app_name, since_s):
                sleeps = self._may_sleep(replica)
                to = ReplicaState.FALLING_ASLEEP if sleeps else ReplicaState.STOPPING
                await self._core.store.save([replace(replica, state=to)])

    async def _end_failed(self) -> None:
        """Give up what failed a while ago: another may be tried in its place."""
        now_s = self._core.clock.monotonic()
        failed = [
            replica
            for replica in self._core.in_state(ReplicaState.FAILED)
            if self._mode(replica) is Mode.TOKENS
        ]
        self._failed_since_s = _kept(self._failed_since_s, failed, now_s)
        for replica in failed:
            if now_s - self._failed_since_s[replica.replica_id] >= FAILED_S:
                await self._core.store.save([replace(replica, state=ReplicaState.STOPPING)])

    def _mode(self, replica: Replica) -> Mode | None:
        deployment = self._core.state.deployments.get(replica.deployment_id)
        return None if deployment is None else deployment.mode

    # -- sleep ---------------------------------------------------------------------------------

    def _may_sleep(self, replica: Replica) -> bool:
        """Whether a replica's engine can, and its node has the memory."""
        core = self._core
        deployment = core.state.deployments.get(replica.deployment_id)
        offer = core.state.offers[replica.place.offer_id]
        if deployment is None or deployment.stopping or not self._takes_pools(replica):
            return False
        if not replica.place.gpu_indices or not core.cluster.can_sleep(deployment.engine, offer):
            return False
        here = [replica]
        for state in (ReplicaState.FALLING_ASLEEP, ReplicaState.ASLEEP):
            here += [r for r in self._core.in_state(state) if r.place.offer_id == offer.offer_id]
        gpus = set(replica.place.gpu_indices)
        if sum(bool(gpus.intersection(r.place.gpu_indices)) for r in here) > SLEEPERS_MAX:
            return False
        models = [core.state.deployments[r.deployment_id].model for r in here]
        needed = sum(core.find(model).weights_bytes for model in models)
        return needed <= ASLEEP_MEMORY * offer.memory_mib * MIB

    async def _end_sleepers(self) -> None:
        """Give up what has slept for so long that keeping it has cost what starting it does."""
        now_s = self._core.clock.monotonic()
        asleep = self._core.in_state(ReplicaState.ASLEEP)
        self._asleep_since_s = _kept(self._asleep_since_s, asleep, now_s)
        for replica in asleep:
            deployment = self._core.state.deployments[replica.deployment_id]
            costs = self._starts.costs(deployment, [replica])
            slept_s = now_s - self._asleep_since_s[replica.replica_id]
            over = slept_s >= autoscaling.keep_asleep_s(costs)
            if over or not self._takes_pools(replica):
                reason = f"asleep for {slept_s:.0f} s"
                gone = replace(replica, state=ReplicaState.STOPPING, reason=reason)
                await self._core.store.save([gone])

    def _takes_pools(self, replica: Replica) -> bool:
        offer = self._core.state.offers[replica.place.offer_id]
        return matching.takes_pools(offer, self._core.clock.now())

    # -- room ----------------------------------------------------------------------------------

    def room_after(self, deployment: Deployment) -> tuple[Offer, list[str]] | None:
        """Where one more replica fits as soon as what leaves has left, and which must leave for it.

        Only idle replicas of other pools may have to; a lease's are never touched.
        """
        model, now_s = self._core.find(deployment.model), self._core.clock.monotonic()
        offers = {offer.offer_id: offer for offer in self._core.offers}
        leaving = [r for r in self._core.state.replicas.values() if r.state in LEAVING]
        self._leaving_since_s = _kept(self._leaving_since_s, leaving, now_s)
        soon = [r for r in leaving if self._leaves_soon(r, now_s)]
        missing: dict[str, int] = {}
        for offer in offers.values():
            milli = matching.share_milli(model, offer)
            if milli is None or not matching.takes_pools(offer, self._core.clock.now()):
                continue
            for gpu, free in zip(offer.gpus, self._core.free_milli(offer, soon), strict=True):
                missing[f"{offer.node_id}/{gpu.index}"] = milli - free
                if free >= milli:
                    return offer, []
        chosen = autoscaling.to_evict(self._idlers(deployment), missing)
        if not chosen:
            return None
        return offers[self._core.state.replicas[chosen[0]].place.offer_id], chosen

    async def _make_room(self, deployment: Deployment, misfit: Misfit) -> None:
        """Put idle replicas of other pools out, if that makes room."""
        found = self.room_after(deployment)
        if found is None:
            logger.info("%s cannot grow: %s", deployment.model, misfit.reason)
            if not self._pools.next_places(self._core.find(deployment.model)):
                self._is_stuck(deployment, misfit.reason)  # not by what other pools do
            return
        _, chosen = found
        if chosen:
            logger.info("%s: room for it by %s", deployment.model, ", ".join(chosen))
            for name in chosen:
                evicted = self._core.state.replicas[name].deployment_id
                self._evicted_s[evicted] = self._core.clock.monotonic()
            await self._drain(chosen, f"idle, and {deployment.model} needs its GPU")

    def _leaves_soon(self, replica: Replica, now_s: float) -> bool:
        since_s = self._leaving_since_s[replica.replica_id]
        return now_s - since_s < LEAVES_S and not self._shares.streams(replica.app_name)

    def _is_stuck(self, deployment: Deployment, reason: str) -> None:
        now_s = self._core.clock.monotonic()
        stuck = self._stuck.get(deployment.deployment_id)
        if stuck is None or now_s - stuck.last_s > 2 * STUCK_S:
            stuck = Stuck(now_s, now_s, reason)
        self._stuck[deployment.deployment_id] = replace(stuck, last_s=now_s, reason=reason)

    def _idlers(self, growing: Deployment) -> list[Idler]:
        """Replicas of other pools that serve nobody and are more than their pool's minimum."""
        now_s, found = self._core.clock.monotonic(), []
        for deployment in self._core.pools:
            memory = self._memories.get(deployment.deployment_id)
            if memory is None or deployment == growing:
                continue
            serving = [
                replica
                for replica in self._core.replicas_of(deployment.deployment_id)
                if replica.state is ReplicaState.READY
            ]
            idle = [
                r
                for r in serving
                if now_s - memory.used_s >= EVICT_AFTER_S
                and self._shares.streams(r.app_name) == 0
                and len(r.place.gpu_indices) == 1
            ]
            costs = self._starts.costs(deployment, serving)
            for replica in idle[: max(0, len(serving) - deployment.bounds.minimum)]:
                place = replica.place
                found.append(
                    Idler(
                        replica.replica_id,
                        f"{place.node_id}/{place.gpu_indices[0]}",
                        place.gpu_milli,
                        now_s - memory.used_s,
                        costs.start_s if costs.wake_s is None else costs.wake_s,
                    )
                )
        return found


def _kept(since_s: dict[str, float], replicas: list[Replica], now_s: float) -> dict[str, float]:
    """Since when each of these is in its state; now, if that is news."""
    return {r.replica_id: since_s.get(r.replica_id, now_s) for r in replicas}
