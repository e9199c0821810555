"""Spare processes: an engine's imports are nearly all of a start, so some are done ahead.

Each waits where the next replica of an elastic pool would go. Which replica gets it is decided when
that starts; another is made when nothing starts on its node any more.
"""

import logging
import uuid
from collections import Counter
from dataclasses import replace

from market import catalog, matching
from market.matching import Misfit
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
STARTING = (ReplicaState.WAITING, ReplicaState.STARTING)


class Spares:
    """Which spare processes there should be. Under the core's lock."""

    def __init__(self, core: Core, pools: Pools) -> None:
        self._core = core
        self._pools = pools
        self._failed_s: dict[tuple[str, str], float] = {}

    def keep(self, view: ClusterView) -> list[Spare]:
        """Give up those that are of no use any more; returns those that are to be started."""
        core, now_s = self._core, self._core.clock.monotonic()
        if not core.config.spares:
            return []
        elastic = [d for d in core.state.deployments.values() if _is_elastic(d)]
        engines = {deployment.engine for deployment in elastic}
        for spare in list(core.spares.values()):
            app = view.apps.get(app_name(spare.process))
            if app is not None and app.failed:
                logger.warning("no spare process of %s: %s", spare.engine, app.message)
                self._failed_s[spare.offer_id, spare.engine] = now_s
            failed = app is not None and app.failed
            if failed or spare.engine not in engines or not self._is_usable(spare.offer_id):
                del core.spares[spare.process]  # the reconciler removes what nobody wants
        wanted = {
            (place, deployment.engine)
            for deployment in elastic
            for place in self._next_places(deployment)
        }
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
            app = view.apps.get(app_name(spare.process))
            if app is not None and app.run is not None:
                return replace(replica, process=spare.process)
        return None

    def is_coming(self, replica: Replica, view: ClusterView) -> bool:
        """Whether a spare process will be ready for a replica sooner than one of its own."""
        apps = [view.apps.get(app_name(spare.process)) for spare in self._fitting(replica)]
        return any(app is not None and not app.failed for app in apps)

    def _fitting(self, replica: Replica) -> list[Spare]:
        deployment = self._core.state.deployments.get(replica.deployment_id)
        if deployment is None or deployment.mode is not Mode.TOKENS or replica.process:
            return []
        wanted = replica.place.offer_id, deployment.engine
        spares = self._core.spares.values()
        return [spare for spare in spares if (spare.offer_id, spare.engine) == wanted]

    def _next_places(self, deployment: Deployment) -> list[str]:
        """Where its next replica would go; [] if it may have no more, or nothing is free."""
        if len(self._core.running(deployment.deployment_id)) >= deployment.bounds.maximum:
            return []
        places = self._pools.places(catalog.find(deployment.model), 1)
        return [] if isinstance(places, Misfit) else [place.offer_id for place in places]

    def _is_usable(self, offer_id: str) -> bool:
        offer = self._core.state.offers.get(offer_id)
        return offer is not None and matching.takes_pools(offer, self._core.clock.now())

    def _is_busy(self, offer_id: str, view: ClusterView) -> bool:
        """Whether anything starts there that somebody may wait for, or another spare."""
        replicas = self._core.state.replicas.values()
        if any(r.place.offer_id == offer_id and r.state in STARTING for r in replicas):
            return True
        here = [spare for spare in self._core.spares.values() if spare.offer_id == offer_id]
        apps = [view.apps.get(app_name(spare.process)) for spare in here]
        return any(app is None or app.run is None for app in apps)


def _is_elastic(deployment: Deployment) -> bool:
    bounds = deployment.bounds
    is_pool = deployment.mode is Mode.TOKENS and not deployment.stopping
    return is_pool and bounds.minimum < bounds.maximum
