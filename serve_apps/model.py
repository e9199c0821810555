"""A model replica: one engine inside one Ray Serve replica.

Its settings are Serve's ``user_config``: what changes them in place (a spare process that is given
its model, a replica that falls asleep or wakes) needs no new process, and a process that Serve
starts in the place of a dead one has them at once. Only a spare process is told by the scheduler,
too (``adopt``): Serve takes its time. Gateways hear from the replica itself whether it is awake.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import ray
from ray import serve

from market.catalog import Model
from market.cluster import directory
from market.cluster.agent import REPLICA_VARIABLE
from market.cluster.engines import sleeps
from market.cluster.models import fetch
from market.cluster.node import NODE_LABEL, NODE_VARIABLE, slot_resource
from market.credit import Credit, within
from market.errors import MarketError, MarketFault, Overloaded, Revoked
from market.fairness import spare
from market.types import (
    Deployment,
    EngineChunk,
    EngineRequest,
    Offer,
    Place,
    Replica,
    ReplicaState,
    Sampling,
    TokenCounts,
    app_name,
)
from serve_apps.engines.base import (
    EngineSettings,
    LoadedEngine,
    SleepingEngine,
    start_engine,
    warm_engine,
)
from serve_apps.frames import State
from serve_apps.lending import Lending
from serve_apps.link import ASLEEP, Address, LinkServer

logger = logging.getLogger(__name__)

REPLICA_CPUS = 0.5
# Gateways queue and know its places a little late; one request may have several answers.
ROOM = 2
CONSTRUCTOR_TRIES = 3
HEALTH_PERIOD_S = 2
HEALTH_TIMEOUT_S = 30
DRAIN_S = 60
LEASE_DRAIN_S = 15
# Of a replica's time to drain, what its engine needs to end its processes.
CLOSE_S = 5
STREAMS_POLL_S = 0.05
COMPILED = ".compiled"  # beside the models, and no model
# Of its share of a card an engine uses this much: contexts and fragments need the rest.
GPU_MEMORY_USED = 0.95
TELL_EVERY_S = 10.0
WARM_UP_AFTER_S = 0.1
WARM_UP = (1, 2, 3, 4)  # tokens that every vocabulary has


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What a replica must know: which it is, its model and that one's files on its node, its place.

    One that is ``asleep`` has its weights in the host's memory and nothing on its GPUs.
    """

    replica_id: str
    model: Model
    models_dir: str
    place: Place
    logical: bool
    sequences: int
    drain_s: float
    asleep: bool = False

    @property
    def gpu_fraction(self) -> float:
        """Share of each card's memory that the engine may use; 0 on CPUs."""
        return 0.0 if self.logical else self.place.gpu_milli / 1000 * GPU_MEMORY_USED


class ModelReplica:
    """Loads a model and streams answers; everything else happens in the gateway.

    Without settings it is a spare: a process with all that its engine imports behind it.
    """

    async def __init__(  # type: ignore[misc]
        self, engine: str, *, rehearses: bool = False
    ) -> None:
        self._engine_name = engine
        self._engine: LoadedEngine | None = None
        self._settings: ReplicaSettings | None = None
        self._changing = asyncio.Lock()
        self._awake = asyncio.Event()
        self._lending = Lending()
        self._served_tokens = 0
        self._said_s = float("-inf")
        self._replica = uuid.uuid4().hex[:12]  # of this process: its count starts at zero
        host = ray.util.get_node_ip_address()
        self._link = LinkServer(self.generate, self.adopt)
        await self._link.start(host)
        address = Address(host, self._link.port, self._link.secret)
        name = app_name(os.environ[REPLICA_VARIABLE])
        await asyncio.to_thread(directory.publish, name, address.pack())
        await asyncio.to_thread(warm_engine, engine, rehearses=rehearses)

    async def reconfigure(self, settings: dict[str, Any]) -> None:
        """Load the model, or fall asleep, or wake. Serve awaits it: running means done."""
        wanted = msgspec.convert(settings, ReplicaSettings)
        async with self._changing:
            self._settings = wanted
            if self._engine is None:
                if not wanted.asleep:  # one that died asleep must not come back on a GPU
                    self._engine = await self._load(wanted)
                    self._wake_up(self._engine)
                    self._warming = asyncio.create_task(self._warm_up(self._engine))
            elif wanted.asleep == self._awake.is_set():
                await self._sleep_or_wake(self._engine, wanted.asleep)

    def adopt(self, settings: dict[str, Any]) -> None:
        """Begin what Serve will ask in a quarter of a second. What it has said itself counts."""
        self._adopting = asyncio.create_task(self._adopt(settings))

    async def _adopt(self, settings: dict[str, Any]) -> None:
        try:
            if self._settings is None:
                await self.reconfigure(settings)
        except Exception as error:  # noqa: BLE001  # Serve asks the same, and tells
            logger.warning("not loaded before Serve asked: %s", error)

    async def _load(self, settings: ReplicaSettings) -> LoadedEngine:
        model, models_dir = settings.model, Path(settings.models_dir)
        folder = await asyncio.to_thread(fetch, model, models_dir, weights=True)
        engine = EngineSettings(
            folder,
            model.served_context_tokens,
            settings.gpu_fraction,
            sequences_max=settings.sequences + spare(settings.sequences),
            tensor_parallel=max(1, len(settings.place.gpu_indices)),
            tool_parser=model.tool_parser,
            reasoning_parser=model.reasoning_parser,
            embeds=model.embeds,
            compiled=models_dir / COMPILED,
        )
        # A spare process did not know its GPUs when it started.
        os.environ.update(visible_gpus(settings.place, settings.logical))
        async with quiet_gpus(settings.place):
            return await start_engine(self._engine_name, engine)

    async def _sleep_or_wake(self, engine: LoadedEngine, asleep: bool) -> None:
        if not isinstance(engine, SleepingEngine):
            raise MarketFault(f"the engine {self._engine_name} cannot sleep")
        assert self._settings is not None
        if not asleep:
            async with quiet_gpus(self._settings.place):
                await engine.wake()
            self._wake_up(engine)
            return
        self._awake.clear()
        self._link.tell(ASLEEP)
        await self._warming
        while self._link.streams:  # gateways send nothing more; what they have sent is answered
            await asyncio.sleep(STREAMS_POLL_S)
        async with quiet_gpus(self._settings.place):
            await engine.sleep()

    def _wake_up(self, engine: LoadedEngine) -> None:
        """Gateways send what waits for us at once: Serve and the scheduler see it later."""
        self._awake.set()
        self._link.tell(State(True, engine.kv_tokens))

    async def _warm_up(self, engine: LoadedEngine) -> None:
        """Engines load the last of what they need with their first answer: if nobody waits for it
        there is time for that.
        """
        await asyncio.sleep(WARM_UP_AFTER_S)
        if self._link.streams:
            return
        assert self._settings is not None
        embeds = self._settings.model.embeds
        request = EngineRequest("warm-up", WARM_UP, Sampling(1), "warm-up", embeds=embeds)
        try:
            async with aclosing(engine.generate(request)) as chunks:
                async for _ in chunks:
                    pass
        except MarketError as error:
            logger.warning("warming up: %s", error)

    async def generate(
        self, request: EngineRequest, credit: Credit
    ) -> AsyncGenerator[EngineChunk, None]:
        """Stream an answer as far as it is paid for. Raises Revoked if it was only lent a place."""
        if self._settings is not None and self._settings.asleep:
            raise Overloaded("this replica sleeps", retry_after_s=1)  # it would wait for us
        await self._awake.wait()
        engine, settings = self._engine, self._settings
        assert engine is not None
        assert settings is not None
        if self._link.streams > ROOM * settings.sequences:
            raise Overloaded("the replica's queue is full", retry_after_s=1)
        delivered = request.resumed  # whoever finishes an answer tells all of it
        first = True
        if not request.stream and not credit.final:
            # An answer in blocks cannot be cut within one, so the engine gives it token by token
            # unless all that it may have is paid for.
            request = msgspec.structs.replace(request, stream=True)
        try:
            async with self._lending.turn(borrowed=request.borrowed):
                rest = _rest(engine, request) if request.resumed else engine.generate(request)
                chunks = within(rest, credit, request.resumed)
                async with aclosing(chunks):
                    async for chunk in chunks:
                        delivered += len(chunk.token_ids)
                        if chunk.finish_reason is not None:
                            self._served_tokens += delivered
                            delivered = 0
                        yield self._signed(chunk, first)
                        first = False
        except Revoked:
            delivered = 0
            raise
        finally:
            self._served_tokens += delivered

    def _signed(self, chunk: EngineChunk, first: bool) -> EngineChunk:
        """The chunk with this replica's name, and now and then the tokens it has delivered."""
        now_s = time.monotonic()
        tells = chunk.finish_reason is not None and now_s - self._said_s > TELL_EVERY_S
        if tells:
            self._said_s = now_s
        if not (first or tells):
            return chunk
        served_tokens = self._served_tokens if tells else None
        return msgspec.structs.replace(chunk, replica=self._replica, served_tokens=served_tokens)

    async def check_health(self) -> None:
        """Raises EngineFailed if the engine cannot serve; Serve then replaces this replica."""
        if self._engine is None:
            return
        try:
            await self._engine.check_health()
        except MarketError:
            self._link.tell(ASLEEP)  # before Serve has made up its mind
            raise

    async def __del__(self) -> None:
        """Let answers end, then the engine's processes: Serve does not know of our streams."""
        link = getattr(self, "_link", None)
        if link is not None:
            self._lending.close()  # they can go on elsewhere
            settings = self._settings
            await link.stop(0 if settings is None else settings.drain_s)
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.close()


async def _rest(engine: LoadedEngine, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
    """What is left of an answer that was begun elsewhere, counted as the whole."""
    begun, sampling = request.resumed, request.sampling
    if sampling.max_tokens is not None:
        sampling = msgspec.structs.replace(
            sampling,
            max_tokens=max(1, sampling.max_tokens - begun),
            min_tokens=max(0, sampling.min_tokens - begun),
        )
    asked = msgspec.structs.replace(request, sampling=sampling)
    async with aclosing(engine.generate(asked)) as chunks:
        async for chunk in chunks:
            said = chunk.counts
            inputs = said.input_tokens - begun
            cached = min(said.cached_input_tokens, inputs)
            counts = TokenCounts(inputs, cached, said.output_tokens + begun)
            yield msgspec.structs.replace(chunk, counts=counts)


def settings_of(
    replica: Replica,
    deployment: Deployment,
    model: Model,
    offer: Offer,
    models_dir: Path,
    sequences: int,
) -> dict[str, Any]:
    """What a replica must know, as its state says, in the form in which it is told."""
    place = replica.place
    settings = ReplicaSettings(
        replica.replica_id,
        model,
        str(models_dir),
        place,
        offer.logical or not place.gpu_indices,
        sequences,
        _drain_s(deployment) - CLOSE_S,
        asleep=replica.state is ReplicaState.FALLING_ASLEEP,
    )
    told: dict[str, Any] = msgspec.to_builtins(settings)
    return told


def build_app(
    replica: Replica, deployment: Deployment, offer: Offer, settings: dict[str, Any]
) -> serve.Application:
    """The Serve application of one replica, on exactly its node and GPUs."""
    place, engine, drain_s = replica.place, deployment.engine, _drain_s(deployment)
    if replica.process:
        return _application(replica.process, engine, offer, {}, 0, drain_s, settings)
    slots = {slot_resource(place.node_id, i): place.gpu_milli / 1000 for i in place.gpu_indices}
    if deployment.lease_id is None and sleeps(engine, logical=offer.logical):
        slots = {}  # an actor cannot give them back while it sleeps
    cpus = 0 if place.gpu_indices else REPLICA_CPUS
    gpus = visible_gpus(place, settings["logical"])
    name = replica.replica_id
    return _application(name, engine, offer, slots, cpus, drain_s, settings, gpus)


def _drain_s(deployment: Deployment) -> float:
    return DRAIN_S if deployment.lease_id is None else LEASE_DRAIN_S


def build_spare(name: str, engine: str, offer: Offer) -> serve.Application:
    """A process that waits for a model. What it runs on is booked by the scheduler alone: Ray
    cannot give an actor more after its start.
    """
    return _application(name, engine, offer, {}, 0, DRAIN_S, None)


def _application(
    process: str,
    engine: str,
    offer: Offer,
    slots: dict[str, float],
    cpus: float,
    drain_s: float,
    settings: dict[str, Any] | None,
    gpus: Mapping[str, str] = MappingProxyType({}),
) -> serve.Application:
    variables = {REPLICA_VARIABLE: process, NODE_VARIABLE: offer.node_id, **gpus}
    if not offer.logical:
        # The slot is the authority: Ray must not blank or change what we say.
        variables["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    served = serve.deployment(
        name="replica",
        num_replicas=1,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=drain_s,
        user_config=settings,
        ray_actor_options={
            "num_cpus": cpus,
            "num_gpus": 0,
            "resources": slots,
            "label_selector": {NODE_LABEL: offer.node_id},
            "runtime_env": {"env_vars": variables},
        },
    )(ModelReplica)
    # Serve has no public name for it any more, and takes every new application for new code, which
    # would cost the process: the same version says that only the settings differ.
    served._version = process
    on_cpus = offer.logical or not offer.gpus
    return served.bind(engine, rehearses=settings is None and on_cpus)


def visible_gpus(place: Place, logical: bool) -> dict[str, str]:
    """What limits a process to its GPUs; nothing on CPUs."""
    if logical:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, place.gpu_indices))}


@contextlib.asynccontextmanager
async def quiet_gpus(place: Place) -> AsyncIterator[None]:
    """Be the only engine that starts on these GPUs of the node.

    Two that profile a card's memory at once misjudge it. The scheduler starts one at a time; Ray
    Serve, which replaces dead replicas by itself, does not.
    """
    with contextlib.ExitStack() as locks:
        for index in sorted(place.gpu_indices):
            path = (
                Path(tempfile.gettempdir()) / f"market-{os.getuid()}-{place.node_id}-{index}.lock"
            )
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            locks.callback(_unlock, descriptor)
            await asyncio.to_thread(fcntl.flock, descriptor, fcntl.LOCK_EX)
        yield


def _unlock(descriptor: int) -> None:
    # Said aloud: a child of the engine may have inherited the descriptor, and with it the lock.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
