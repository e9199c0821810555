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
RETURNING = (ReplicaState.DRAINING, ReplicaState.FALLING_ASLEEP, ReplicaState.ASLEEP)
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


@dataclass(frozen=True, slots=True)
class Room:
    """A node for a replica, which must leave for it, and what an hour costs."""

    offer: Offer
    evicts: list[str]
    hour_pico: int


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
        self._served_s: dict[str, float] = {}
        self._evicted_s: dict[str, float] = {}
        self._stuck: dict[str, Stuck] = {}

    async def round(self) -> None:
        """Bring every pool a step closer to what it needs."""
        async with self._core.lock:
            await self._starts.measure()
            await self._end_lost()
            await self._end_drained()
            await self._end_sleepers()
            await self._end_failed()
            pools = self._core.pools
            for gone in self._memories.keys() - {pool.deployment_id for pool in pools}:
                del self._memories[gone]
                self._evicted_s.pop(gone, None)
                self._stuck.pop(gone, None)
                self._served_s.pop(gone, None)
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
        others = [r for r in replicas if r.state in RETURNING]
        failed = [r for r in replicas if r.state is ReplicaState.FAILED]
        pool, decision = self._decide(deployment, present)
        missing = decision.replicas - len(present)
        why = ""
        # If more fail than serve it is not their places' fault.
        if missing > 0 and (not failed or len(failed) <= len(present) + len(others)):
            # For who asks, not for who is only expected.
            asked = not pool.demand.idle or len(present) < deployment.bounds.minimum
            misfit = await self._grow(deployment, present, missing, makes_room=asked)
            why = "" if misfit is None or not asked else misfit.reason
        elif missing < 0 and self._shares.heard:
            await self._shrink(present, -missing, decision)
        elif decision.signal is Signal.BUDGET and not decision.replicas:
            why = decision.reason
        if why and not (present or others):
            self._is_stuck(deployment, why)

    def _decide(self, deployment: Deployment, present: list[Replica]) -> tuple[Snapshot, Decision]:
        core = self._core
        now_s = core.clock.monotonic()
        memory = self._memories.setdefault(deployment.deployment_id, Memory(now_s))
        apps = [r.app_name for r in present if r.state is ReplicaState.READY]
        if apps:
            self._served_s[deployment.deployment_id] = now_s
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
            next_pico=self._next_pico(deployment, present),
            speed=memory.speed,
            stretch=self._forecasts.stretch(deployment.model, deployment.bounds, costs),
            ahead=self._ahead(deployment, now_s - memory.used_s, costs, bool(present)),
        )
        return pool, memory.decide(pool, now_s)

    def _next_pico(self, deployment: Deployment, present: list[Replica]) -> int | None:
        """What an hour of its next replica costs: of what the budget pays for, if there is room."""
        if deployment.bounds.spend_max_pico is None:
            return None
        for most_pico in (self._left_pico(deployment, present), None):
            found = self._pools.places(self._core.find(deployment.model), 1, most_pico=most_pico)
            if not isinstance(found, Misfit):
                return self._core.hour_pico(found[0])
            room = self.room_after(deployment, most_pico)
            if room is not None:
                return room.hour_pico
        return None

    def _left_pico(self, deployment: Deployment, present: Iterable[Replica]) -> int | None:
        """What its budget leaves for one more; None if there is none, or it must have one more."""
        hours = [self._core.hour_pico(replica.place) for replica in present]
        bounds = deployment.bounds
        if bounds.spend_max_pico is None or len(hours) < bounds.minimum:
            return None
        return bounds.spend_max_pico - sum(hours)

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

    async def _grow(
        self, deployment: Deployment, present: list[Replica], count: int, *, makes_room: bool
    ) -> Misfit | None:
        """Take back what drains, then wake what sleeps, then start anew, or make room: one at a
        time, as far as the budget pays. Returns why there is no room and none can be made.
        """
        replicas = self._core.replicas_of(deployment.deployment_id)
        back = [r for r in replicas if r.state is ReplicaState.DRAINING]
        back += [r for r in replicas if r.state is ReplicaState.ASLEEP and self._takes_pools(r)]
        # Who falls asleep is woken as soon as it sleeps.
        count -= sum(replica.state is ReplicaState.FALLING_ASLEEP for replica in replicas)
        there = list(present)
        for replica in back:
            left_pico = self._left_pico(deployment, there)
            if count <= 0 or not _pays(left_pico, self._core.hour_pico(replica.place)):
                continue
            if await self._returns(replica):
                there.append(replica)
                count -= 1
        for _ in range(count):
            left_pico = self._left_pico(deployment, there)
            misfit = await self._pools.add_replica(deployment.deployment_id, left_pico)
            if misfit is not None:
                return await self._make_room(deployment, misfit, left_pico) if makes_room else None
            now = self._core.replicas_of(deployment.deployment_id)
            there += [r for r in now if r.state in SERVING and r not in there]
        return None

    async def _returns(self, replica: Replica) -> bool:
        """Have one that drains serve again, or one that sleeps wake up, if its GPU has room."""
        if replica.state is ReplicaState.DRAINING:
            self._draining_since_s.pop(replica.replica_id, None)
            back = replace(replica, state=ReplicaState.READY, reason="serving")
            await self._core.store.save([back])
            return True
        try:
            await self._core.grant(
                [replace(replica, state=ReplicaState.STARTING, reason="waking up")]
            )
        except Oversubscribed:
            return False
        self._starts.wakes(replica)
        return True

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

    async def _end_lost(self) -> None:
        """Stop what serves a model that the catalog has lost: nobody can be sent there."""
        known = {pool.deployment_id for pool in self._core.pools}
        for deployment in list(self._core.state.deployments.values()):
            is_pool = deployment.mode is Mode.TOKENS and not deployment.stopping
            if is_pool and deployment.deployment_id not in known:
                reason = f"{deployment.model} is in the catalog no more"
                lost = self._core.running(deployment.deployment_id)
                gone = [replace(r, state=ReplicaState.STOPPING, reason=reason) for r in lost]
                if gone:
                    await self._core.store.save(gone)

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
            since_s = self._failed_since_s[replica.replica_id]
            # Where another has served since, but is gone, it is not the model's fault.
            served = self._served_s.get(replica.deployment_id, float("-inf")) >= since_s
            alone = all(
                other.state is ReplicaState.FAILED
                for other in self._core.running(replica.deployment_id)
            )
            if now_s - since_s >= FAILED_S or (served and alone):
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

    def room_after(self, deployment: Deployment, most_pico: int | None = None) -> Room | None:
        """Where one more replica fits as soon as what leaves has left, and which must leave for it.

        Only idle replicas of other pools may have to; a lease's are never touched. It costs at most
        ``most_pico`` an hour.
        """
        core, model = self._core, self._core.find(deployment.model)
        now_s, now = core.clock.monotonic(), core.clock.now()
        leaving = [r for r in core.state.replicas.values() if r.state in LEAVING]
        self._leaving_since_s = _kept(self._leaving_since_s, leaving, now_s)
        soon = core.by_offer(r for r in leaving if self._leaves_soon(r, now_s))
        missing: dict[str, int] = {}
        hours: dict[str, int] = {}
        for offer in core.offers:
            milli = matching.share_milli(model, offer)
            if milli is None or not matching.takes_pools(offer, now):
                continue
            hour_pico = matching.hour_pico(offer, milli)
            if not _pays(most_pico, hour_pico):
                continue
            hours[offer.offer_id] = hour_pico
            free = core.free_milli(offer, soon.get(offer.offer_id, ()))
            if max(free) >= milli:
                return Room(offer, [], hour_pico)
            for gpu, left in zip(offer.gpus, free, strict=True):
                missing[f"{offer.node_id}/{gpu.index}"] = milli - left
        chosen = autoscaling.to_evict(self._idlers(deployment), missing)
        if not chosen:
            return None
        offer_id = core.state.replicas[chosen[0]].place.offer_id
        return Room(core.state.offers[offer_id], chosen, hours[offer_id])

    async def _make_room(
        self, deployment: Deployment, misfit: Misfit, most_pico: int | None
    ) -> Misfit | None:
        """Put idle replicas of other pools out, if that makes room.

        Returns why it does not fit, if it would not even if other pools had none.
        """
        room = self.room_after(deployment, most_pico)
        if room is None:
            logger.info("%s cannot grow: %s", deployment.model, misfit.reason)
            model = self._core.find(deployment.model)
            fits = self._pools.places(model, 1, emptied=True, most_pico=most_pico)
            return misfit if isinstance(fits, Misfit) else None
        if room.evicts:
            logger.info("%s: room for it by %s", deployment.model, ", ".join(room.evicts))
            for name in room.evicts:
                evicted = self._core.state.replicas[name].deployment_id
                self._evicted_s[evicted] = self._core.clock.monotonic()
            await self._drain(room.evicts, f"idle, and {deployment.model} needs its GPU")
        return None

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
            idle = idle[: max(0, len(serving) - deployment.bounds.minimum)]
            costs = self._starts.costs(deployment, serving) if idle else None
            for replica in idle:
                assert costs is not None
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


def _pays(left_pico: int | None, hour_pico: int) -> bool:
    return left_pico is None or hour_pico <= left_pico
