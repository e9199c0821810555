"""What replicas cost to hold, to start and to wake: measured, by what there was before."""

from collections.abc import Iterable

from market.autoscaling import Costs
from market.catalog import Model
from market.scheduler.core import Core
from market.scheduler.pools import Pools
from market.types import Deployment, Place, Replica, ReplicaState, StartCost, StartFrom

# Until a start was measured: imports, set-up, then the weights at the speed of what they are read
# from: a disk, or the host's memory.
IMPORTS_S = {"vllm": 25.0, "transformers": 8.0}
SET_UP_S = {"vllm": 20.0, "transformers": 7.0}
WAKE_S = 1.0
DISK_BYTES_PER_S = 1e9
MEMORY_BYTES_PER_S = 10e9
# Weight of the newest measurement.
NEWEST = 0.3


class Starts:
    """Notes how long starts take. Under the core's lock."""

    def __init__(self, core: Core, pools: Pools) -> None:
        self._core = core
        self._pools = pools
        self._starting: dict[str, tuple[float, StartFrom]] = {}
        self._known: set[str] | None = None

    def wakes(self, replica: Replica) -> None:
        """It begins to wake now."""
        self._starting[replica.replica_id] = self._core.clock.monotonic(), StartFrom.ASLEEP

    def in_process(self, replica: Replica) -> bool:
        """Whether it starts in a process that was there: a spare one, or its own that slept."""
        _, begun = self._starting.get(replica.replica_id, (0.0, None))
        return bool(replica.process) or begun is StartFrom.ASLEEP

    def costs(self, deployment: Deployment, present: list[Replica]) -> Costs:
        """What a replica costs an hour, to start and to wake: of those ``present``, or of one where
        it would go.
        """
        model = self._core.find(deployment.model)
        offers = self._core.state.offers
        places = [replica.place for replica in present] or self._pools.likely_places(model)
        gpu_types = {offers[place.offer_id].gpu_type for place in places}

        def cost_s(begun: StartFrom) -> float:
            starts = self._core.state.starts.values()
            prefix = f"{model.name}/{deployment.engine}/"
            known = [
                cost.seconds
                for cost in starts
                if cost.start_id.startswith(prefix)
                and cost.start_id.endswith(f"/{begun}")
                and (not gpu_types or cost.start_id.split("/")[2] in gpu_types)
            ]
            return max(known, default=guess_s(model, deployment.engine, begun))

        physical = [offers[place.offer_id] for place in places if place.gpu_indices]
        can = [self._core.cluster.can_sleep(deployment.engine, offer) for offer in physical]
        return Costs(
            max((self._core.hour_pico(place) for place in places), default=0),
            cost_s(self._will_begin_from(model, places)),
            cost_s(StartFrom.ASLEEP) if can and all(can) else None,
        )

    async def measure(self) -> None:
        """Keep how long starts take, as a moving mean, by model, engine, type of GPU and state.

        Of replicas that are new, or wake, on nodes that have the model: not of one whose node was
        out of sight, nor of a download.
        """
        core, now_s = self._core, self._core.clock.monotonic()
        begun, self._starting = self._starting, {}
        old = core.state.replicas.keys() if self._known is None else self._known
        waiting = {replica.replica_id for replica in core.in_state(ReplicaState.WAITING)}
        for replica in core.in_state(ReplicaState.STARTING):
            name = replica.replica_id
            if name in begun:
                self._starting[name] = begun.pop(name)
                if replica.process and self._starting[name][1] in (StartFrom.COLD, StartFrom.HOST):
                    self._starting[name] = now_s, StartFrom.SPARE  # it was given one only now
            elif name not in old and self._has_files(replica):
                self._starting[name] = now_s, self._begun_from(replica)
        self._known = set(core.state.replicas) - waiting
        for name, (since_s, start_from) in begun.items():
            started = core.state.replicas.get(name)
            if started is None or started.state is not ReplicaState.READY:
                continue
            deployment = core.state.deployments.get(started.deployment_id)
            if deployment is None:
                continue
            gpu_type = core.state.offers[started.place.offer_id].gpu_type
            start_id = f"{deployment.model}/{deployment.engine}/{gpu_type}/{start_from}"
            known = core.state.starts.get(start_id)
            took_s = now_s - since_s
            mean_s = took_s if known is None else known.seconds + NEWEST * (took_s - known.seconds)
            count = 1 if known is None else known.count + 1
            await core.store.save([StartCost(start_id, mean_s, count, core.clock.now())])

    def _has_files(self, replica: Replica) -> bool:
        deployment = self._core.state.deployments.get(replica.deployment_id)
        there = self._core.on_disk.get(replica.place.node_id)
        return deployment is not None and (there is None or deployment.model in there)

    def _will_begin_from(self, model: Model, places: Iterable[Place]) -> StartFrom:
        if self._core.config.spares:
            return StartFrom.SPARE
        nodes = [self._core.in_memory.get(place.node_id, ()) for place in places]
        return StartFrom.HOST if nodes and all(model.name in n for n in nodes) else StartFrom.COLD

    def _begun_from(self, replica: Replica) -> StartFrom:
        if replica.process:
            return StartFrom.SPARE
        deployment = self._core.state.deployments.get(replica.deployment_id)
        cached = self._core.in_memory.get(replica.place.node_id, frozenset())
        in_memory = deployment is not None and deployment.model in cached
        return StartFrom.HOST if in_memory else StartFrom.COLD


def guess_s(model: Model, engine: str, start_from: StartFrom) -> float:
    """How long a start may take that was never measured."""
    weights = model.weights_bytes
    imports_s = IMPORTS_S.get(engine, IMPORTS_S["vllm"])
    set_up_s = SET_UP_S.get(engine, SET_UP_S["vllm"])
    match start_from:
        case StartFrom.ASLEEP:
            return WAKE_S + weights / MEMORY_BYTES_PER_S
        case StartFrom.SPARE:
            return set_up_s + weights / DISK_BYTES_PER_S
        case StartFrom.HOST:
            return imports_s + set_up_s + weights / MEMORY_BYTES_PER_S
        case StartFrom.COLD:
            return imports_s + set_up_s + weights / DISK_BYTES_PER_S
