"""Spare processes: an engine's imports are nearly all of a start, so some are done ahead.

Each waits where the next replica of an elastic pool would go, or could if another pool's made room.
Which replica gets it is decided when that starts; another is made when nothing starts on its node
any more.
"""

import logging
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from market import matching
from market.scheduler.core import Core
from market.scheduler.pools import Pools
from market.types import (
    ClusterView,
    Deployment,
    Mode,
    Replica,
    ReplicaState,
    Spare,
    app_name,
)

logger = logging.getLogger(__name__)

# Where a process could not start, none is tried for so long.
RETRY_S = 600.0
# One that is not ready by then does not come (again).
COMES_WITHIN_S = 180.0
# Where all GPUs are full, so many nodes at most have one for each engine.
FULL_MAX = 4
# One whose place is no longer the next for anybody goes after so long.
UNWANTED_S = 300.0
STARTING = (ReplicaState.WAITING, ReplicaState.STARTING)


class Spares:
    """Which spare processes there should be. Under the core's lock."""

    def __init__(self, core: Core, pools: Pools) -> None:
        self._core = core
        self._pools = pools
        self._failed_s: dict[tuple[str, str], float] = {}
        self._ready_s: dict[str, float] = {}
        self._wanted_s: dict[str, float] = {}

    def keep(self, view: ClusterView) -> list[Spare]:
        """Give up those that are of no use any more; returns those that are to be started."""
        core, now_s = self._core, self._core.clock.monotonic()
        if not core.config.spares:
            return []
        elastic = [pool for pool in core.pools if _is_elastic(pool)]
        homes = {
            pool.deployment_id: {
                replica.place.offer_id for replica in core.replicas_of(pool.deployment_id)
            }
            for pool in elastic
        }
        wanted = {
            (place, pool.engine) for pool in elastic for place in self._next_places(pool, homes)
        }
        engines = {pool.engine for pool in elastic}
        self._look(view, wanted)
        for spare in list(core.spares.values()):
            place = spare.offer_id, spare.engine
            app = view.apps.get(app_name(spare.process))
            why = app.message if app is not None and app.failed else ""
            if now_s - self._ready_s[spare.process] >= COMES_WITHIN_S:
                why = f"it is not ready after {COMES_WITHIN_S:.0f} s"
            if why:
                logger.warning("no spare process of %s: %s", spare.engine, why)
                self._failed_s[place] = now_s
            unwanted = now_s - self._wanted_s[spare.process] >= UNWANTED_S
            no_use = spare.engine not in engines or not self._is_usable(spare.offer_id)
            if why or unwanted or no_use:
                del core.spares[spare.process]  # the reconciler removes what nobody wants
        there = Counter((spare.offer_id, spare.engine) for spare in core.spares.values())
        known_s = self._failed_s.items()
        self._failed_s = {key: at_s for key, at_s in known_s if now_s - at_s < RETRY_S}
        # One whose application is not there (yet) may have to be started again.
        fresh = [s for s in core.spares.values() if app_name(s.process) not in view.apps]
        for offer_id, engine in sorted(wanted - self._failed_s.keys()):
            enough = there[offer_id, engine] >= core.config.spares
            if not enough and not self._is_busy(offer_id, view):
                node_id = core.state.offers[offer_id].node_id
                spare = Spare(f"spare-{uuid.uuid4().hex[:12]}", offer_id, node_id, engine)
                core.spares[spare.process] = spare
                fresh.append(spare)
        return fresh

    def give(self, replica: Replica, view: ClusterView) -> Replica | None:
        """The replica in a spare process of its node, if one is ready."""
        for spare in self._fitting(replica):
            if _is_ready(spare, view):
                return replace(replica, process=spare.process)
        return None

    def is_coming(self, replica: Replica, view: ClusterView) -> bool:
        """Whether a spare process will be ready for a replica sooner than one of its own."""
        apps = [view.apps.get(app_name(spare.process)) for spare in self._fitting(replica)]
        return any(app is not None and not app.failed for app in apps)

    def _look(self, view: ClusterView, wanted: set[tuple[str, str]]) -> None:
        """When each was last seen ready, and where one was wanted."""
        now_s, spares = self._core.clock.monotonic(), self._core.spares.values()
        ready_s, wanted_s = self._ready_s, self._wanted_s
        self._ready_s = {
            s.process: now_s if _is_ready(s, view) else ready_s.get(s.process, now_s)
            for s in spares
        }
        self._wanted_s = {
            s.process: now_s if (s.offer_id, s.engine) in wanted else wanted_s.get(s.process, now_s)
            for s in spares
        }

    def _fitting(self, replica: Replica) -> list[Spare]:
        deployment = self._core.state.deployments.get(replica.deployment_id)
        if deployment is None or deployment.mode is not Mode.TOKENS or replica.process:
            return []
        wanted = replica.place.offer_id, deployment.engine
        spares = self._core.spares.values()
        return [spare for spare in spares if (spare.offer_id, spare.engine) == wanted]

    def _next_places(self, pool: Deployment, homes: Mapping[str, set[str]]) -> list[str]:
        """Where its next replica would go, or, if nothing is free, could if another pool's made
        room (``homes``: where each elastic pool's are); [] if it may have no more.
        """
        core = self._core
        if len(core.running(pool.deployment_id)) >= pool.bounds.maximum:
            return []
        model = core.find(pool.model)
        places = self._pools.likely_places(model, emptied=False)
        if places:
            return [place.offer_id for place in places]
        others = set().union(*(own for name, own in homes.items() if name != pool.deployment_id))
        there = {s.offer_id for s in core.spares.values() if s.engine == pool.engine}
        fits = [
            name
            for name in sorted(others, key=lambda name: (name not in there, name))
            if matching.share_milli(model, core.state.offers[name]) and self._is_usable(name)
        ]
        return fits[:FULL_MAX]

    def _is_usable(self, offer_id: str) -> bool:
        offer = self._core.state.offers.get(offer_id)
        return offer is not None and matching.takes_pools(offer, self._core.clock.now())

    def _is_busy(self, offer_id: str, view: ClusterView) -> bool:
        """Whether anything starts there that somebody may wait for, or another spare."""
        here = [r for r in self._core.state.replicas.values() if r.place.offer_id == offer_id]
        if any(r.state in STARTING and self._may_start(r) for r in here):
            return True
        spares = [spare for spare in self._core.spares.values() if spare.offer_id == offer_id]
        return not all(_is_ready(spare, view) for spare in spares)

    def _may_start(self, replica: Replica) -> bool:
        lease = self._core.state.leases.get(replica.deployment_id)
        return lease is None or lease.start <= self._core.clock.now()


def _is_ready(spare: Spare, view: ClusterView) -> bool:
    app = view.apps.get(app_name(spare.process))
    return app is not None and app.run is not None


def _is_elastic(deployment: Deployment) -> bool:
    return deployment.bounds.minimum < deployment.bounds.maximum
