"""Wanted replicas against what is seen in the cluster -> steps. Pure.

Each step may be done twice, and a crash between any two is cured by planning again.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from market.types import AppStatus, Offer, OfferState, Place, Replica, ReplicaState, Spare, app_name

APP_PREFIX = app_name("")
WHOLE_GPU = 1000


@dataclass(frozen=True, slots=True)
class Start:
    """Make the replica's application exist, with the settings that the replica's state asks for."""

    replica: Replica


@dataclass(frozen=True, slots=True)
class Remove:
    """Make an application not exist."""

    app_name: str


@dataclass(frozen=True, slots=True)
class Mark:
    """Remember a replica's state and why."""

    replica_id: str
    state: ReplicaState
    reason: str


@dataclass(frozen=True, slots=True)
class End:
    """End the processes that a replica left on its node, by what they carry."""

    process_id: str
    node_id: str


@dataclass(frozen=True, slots=True)
class Forget:
    """The replica is gone and its GPU is seen free."""

    replica_id: str


Step = Start | Remove | Mark | End | Forget


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen: applications by name; per node the replicas with processes there.

    ``memory_taken`` are (node, GPU index) whose memory is still in use. A node is missing from
    ``residents`` if it was not asked or did not answer.
    """

    apps: Mapping[str, AppStatus]
    residents: Mapping[str, frozenset[str]] = field(default_factory=dict)
    memory_taken: frozenset[tuple[str, int]] = frozenset()


def plan(
    replicas: Iterable[Replica],
    offers: Mapping[str, Offer],
    starts: Mapping[str, datetime],
    seen: Seen,
    now: datetime,
    spares: Iterable[Spare] = (),
) -> list[Step]:
    """Steps that bring the cluster closer to what is wanted; none if nothing differs.

    ``starts`` says before which moment a replica must not run, by its id. ``spares`` may run, too.
    """
    wanted = sorted(replicas, key=lambda r: (r.created_at, r.replica_id))
    steps: list[Step] = []
    homes = {spare.process: spare.node_id for spare in spares}
    homes |= {replica.process_id: replica.place.node_id for replica in wanted}
    names = {app_name(process) for process in homes}
    for name in sorted(seen.apps):
        if name.startswith(APP_PREFIX) and name not in names:
            steps.append(Remove(name))
    strangers = _strangers(homes, seen)
    steps.extend(strangers)
    crowded = {step.node_id for step in strangers}
    used: Counter[tuple[str, int]] = Counter()
    for replica in wanted:
        if replica.state not in (ReplicaState.WAITING, ReplicaState.ASLEEP):
            used.update(dict.fromkeys(_gpus(replica.place), replica.place.gpu_milli))
    busy = {
        gpu
        for replica in wanted
        if replica.state is not ReplicaState.ASLEEP
        and _is_starting(seen.apps.get(replica.app_name))
        and _lives(offers, replica.place)
        for gpu in _gpus(replica.place)
    }
    for replica in wanted:
        if replica.state is not ReplicaState.WAITING:
            steps.extend(_steps(replica, offers, seen, busy))
    for replica in wanted:
        if replica.state is ReplicaState.WAITING:
            free = replica.place.node_id not in crowded
            steps.extend(_start(replica, offers, starts, used, busy, now, free))
    return steps


def _start(
    replica: Replica,
    offers: Mapping[str, Offer],
    starts: Mapping[str, datetime],
    used: Counter[tuple[str, int]],
    busy: set[tuple[str, int]],
    now: datetime,
    free: bool,
) -> list[Step]:
    """Start what waits, if its moment has come and its GPUs are free and quiet."""
    place, gpus = replica.place, _gpus(replica.place)
    start = starts.get(replica.replica_id)
    reason = ""
    if start is not None and now < start:
        reason = f"booked from {start:%Y-%m-%d %H:%M:%S} UTC on"
    elif not _lives(offers, place):
        reason = f"node {place.node_id} is {_state(offers, place)}"
    elif not free or any(used[gpu] + place.gpu_milli > WHOLE_GPU for gpu in gpus):
        reason = "its GPU is being freed"
    elif busy.intersection(gpus):
        reason = "another engine is starting on its GPU"
    if reason:
        return _mark(replica, ReplicaState.WAITING, reason)
    busy.update(gpus)
    for gpu in gpus:
        used[gpu] += place.gpu_milli
    return [*_mark(replica, ReplicaState.STARTING, "replica starting"), Start(replica)]


def _steps(
    replica: Replica,
    offers: Mapping[str, Offer],
    seen: Seen,
    busy: set[tuple[str, int]],
) -> list[Step]:
    app = seen.apps.get(replica.app_name)
    if replica.state is ReplicaState.STOPPING:
        if app is not None:
            return [Remove(replica.app_name)]
        return _mark(replica, ReplicaState.FREEING, "its processes are ending")
    if replica.state is ReplicaState.FREEING:
        return _free(replica, offers, seen)
    if replica.state is ReplicaState.DRAINING:
        there = app is not None and not app.failed and _lives(offers, replica.place)
        return [] if there else _mark(replica, ReplicaState.STOPPING, replica.reason)
    if replica.state in (ReplicaState.FALLING_ASLEEP, ReplicaState.ASLEEP):
        return _sleep(replica, app, offers)
    if app is None:
        return _again(replica, offers, busy)
    if not _lives(offers, replica.place) and replica.state is not ReplicaState.FAILED:
        reason = f"node {replica.place.node_id} is {_state(offers, replica.place)}"
        return _mark(replica, ReplicaState.STARTING, reason)
    if app.failed:
        reason = app.message or "the replica did not start"
        return _mark(replica, ReplicaState.FAILED, reason)
    if app.run is not None and (app.replica_id != replica.replica_id or app.asleep):
        return [*_mark(replica, ReplicaState.STARTING, "replica starting"), Start(replica)]
    if app.run is not None:
        return _mark(replica, ReplicaState.READY, "serving")
    if app.unsure and replica.state is ReplicaState.READY:
        return []  # its answers go on, and new ones come
    return _mark(replica, ReplicaState.STARTING, app.message or "replica starting")


def _sleep(replica: Replica, app: AppStatus | None, offers: Mapping[str, Offer]) -> list[Step]:
    """Its GPU is free only when its settings are seen in force."""
    if app is None or app.failed or not _lives(offers, replica.place):
        return _mark(replica, ReplicaState.STOPPING, replica.reason)
    if replica.state is ReplicaState.ASLEEP or app.run is None:
        return []
    if app.asleep and app.replica_id == replica.replica_id:
        return _mark(replica, ReplicaState.ASLEEP, "asleep; the next request wakes it")
    return [Start(replica)]


def _again(replica: Replica, offers: Mapping[str, Offer], busy: set[tuple[str, int]]) -> list[Step]:
    """The application is gone though it is wanted: the cluster was restarted."""
    if replica.state is ReplicaState.FAILED:
        return []
    if not _lives(offers, replica.place):
        reason = f"node {replica.place.node_id} is {_state(offers, replica.place)}"
        return _mark(replica, ReplicaState.STARTING, reason)
    if busy.intersection(_gpus(replica.place)):
        return _mark(replica, ReplicaState.WAITING, "another engine is starting on its GPU")
    busy.update(_gpus(replica.place))
    return [*_mark(replica, ReplicaState.STARTING, "replica starting"), Start(replica)]


def _free(replica: Replica, offers: Mapping[str, Offer], seen: Seen) -> list[Step]:
    """A GPU is free again only when no process of the replica is left and its memory is free."""
    place = replica.place
    if replica.app_name in seen.apps:
        return [Remove(replica.app_name)]
    if _state(offers, place) is OfferState.LEFT:
        return [Forget(replica.replica_id)]
    residents = seen.residents.get(place.node_id)
    if residents is None:
        return []
    if replica.process_id in residents:
        return [End(replica.process_id, place.node_id)]
    if seen.memory_taken.intersection(_gpus(place)):
        return _mark(replica, ReplicaState.FREEING, "its GPU's memory is not free yet")
    return [Forget(replica.replica_id)]


def _strangers(homes: Mapping[str, str], seen: Seen) -> list[End]:
    """Processes that nobody wants, or not on that node: a node came back with them."""
    return [
        End(process_id, node_id)
        for node_id, residents in sorted(seen.residents.items())
        for process_id in sorted(residents)
        if homes.get(process_id) != node_id
    ]


def _is_starting(app: AppStatus | None) -> bool:
    """Whether an engine starts, by us or by Serve.

    No other may start on its GPU meanwhile: two that profile its memory at once misjudge it.
    """
    return app is not None and app.run is None and not app.failed


def _gpus(place: Place) -> list[tuple[str, int]]:
    return [(place.node_id, index) for index in place.gpu_indices]


def _lives(offers: Mapping[str, Offer], place: Place) -> bool:
    return _state(offers, place) in (OfferState.OPEN, OfferState.DRAINING)


def _state(offers: Mapping[str, Offer], place: Place) -> OfferState:
    offer = offers.get(place.offer_id)
    return OfferState.LEFT if offer is None else offer.state


def _mark(replica: Replica, state: ReplicaState, reason: str) -> list[Step]:
    if (replica.state, replica.reason) == (state, reason):
        return []
    return [Mark(replica.replica_id, state, reason)]
