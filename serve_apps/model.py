"""A model replica: one engine inside one Ray Serve replica."""

import asyncio
import contextlib
import fcntl
import logging
import os
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import ray
from ray import serve

from market.catalog import Model, find
from market.cluster.agent import REPLICA_VARIABLE
from market.cluster.models import fetch
from market.cluster.node import NODE_LABEL, NODE_VARIABLE, slot_resource
from market.credit import Credit, within
from market.errors import MarketError, Overloaded
from market.fairness import spare
from market.types import (
    Deployment,
    EngineChunk,
    EngineRequest,
    Offer,
    Place,
    Replica,
    Sampling,
)
from serve_apps.engines.base import EngineSettings, start_engine
from serve_apps.link import LinkServer

logger = logging.getLogger(__name__)

REPLICA_CPUS = 0.5
ONGOING_MAX = 256  # calls through Serve: addresses only
# Gateways queue and know its places a little late; one request may have several answers.
ROOM = 2
CONSTRUCTOR_TRIES = 3
HEALTH_PERIOD_S = 2
HEALTH_TIMEOUT_S = 30
DRAIN_S = 60
LEASE_DRAIN_S = 15
# Of a replica's time to drain, what its engine needs to end its processes.
CLOSE_S = 5
# Of its share of a card an engine uses this much: contexts and fragments need the rest.
GPU_MEMORY_USED = 0.95
TELL_EVERY_S = 10.0
WARM_UP = (1, 2, 3, 4)  # tokens that every vocabulary has


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What a replica must know: the model's files on its node, its engine, its place."""

    model: str
    engine: str
    models_dir: Path
    place: Place
    logical: bool
    sequences: int
    drain_s: float

    @property
    def gpu_fraction(self) -> float:
        """Share of each card's memory that the engine may use; 0 on CPUs."""
        return 0.0 if self.logical else self.place.gpu_milli / 1000 * GPU_MEMORY_USED


class ModelReplica:
    """Loads a model and streams answers; everything else happens in the gateway."""

    async def __init__(self, settings: ReplicaSettings) -> None:  # type: ignore[misc]
        # Serve awaits it: running means loaded.
        entry = find(settings.model)
        folder = await asyncio.to_thread(fetch, entry, settings.models_dir, weights=True)
        engine = EngineSettings(
            folder,
            entry.served_context_tokens,
            settings.gpu_fraction,
            sequences_max=settings.sequences + spare(settings.sequences),
            tensor_parallel=max(1, len(settings.place.gpu_indices)),
            tool_parser=entry.tool_parser,
            reasoning_parser=entry.reasoning_parser,
            embeds=entry.embeds,
        )
        async with quiet_gpus(settings.place):
            self._engine = await start_engine(settings.engine, engine)
        self._streams_max = ROOM * settings.sequences
        self._drain_s = settings.drain_s
        self._served_tokens = 0
        self._said_s = float("-inf")
        self._replica = uuid.uuid4().hex[:12]  # of this process: its count starts at zero
        self._host = ray.util.get_node_ip_address()
        self._link = LinkServer(self.generate)
        await self._link.start(self._host)
        self._warming = asyncio.create_task(self._warm_up(entry.embeds))

    async def _warm_up(self, embeds: bool) -> None:
        """Engines load the last of what they need with their first answer: while gateways look for
        us there is time for that.
        """
        request = EngineRequest("warm-up", WARM_UP, Sampling(1), "warm-up", embeds=embeds)
        try:
            async with aclosing(self._engine.generate(request)) as chunks:
                async for _ in chunks:
                    pass
        except MarketError as error:
            logger.warning("warming up: %s", error)

    async def address(self) -> tuple[str, int, str]:
        """Where gateways find this replica's link, and the secret that it wants to see."""
        return self._host, self._link.port, self._link.secret

    async def generate(
        self, request: EngineRequest, credit: Credit
    ) -> AsyncGenerator[EngineChunk, None]:
        """Stream an answer as far as it is paid for."""
        if self._link.streams > self._streams_max:
            raise Overloaded("the replica's queue is full", retry_after_s=1)
        delivered = 0
        first = True
        if not request.stream and not credit.final:
            # An answer in blocks cannot be cut within one, so the engine gives it token by token
            # unless all that it may have is paid for.
            request = msgspec.structs.replace(request, stream=True)
        try:
            chunks = within(self._engine.generate(request), credit)
            async with aclosing(chunks):
                async for chunk in chunks:
                    delivered += len(chunk.token_ids)
                    if chunk.finish_reason is not None:
                        self._served_tokens += delivered
                        delivered = 0
                    yield self._signed(chunk, first)
                    first = False
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
        await self._engine.check_health()

    async def __del__(self) -> None:
        """Let answers end, then the engine's processes: Serve does not know of our streams."""
        link = getattr(self, "_link", None)
        if link is not None:
            await link.stop(self._drain_s)
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.close()


def build_app(
    replica: Replica,
    deployment: Deployment,
    model: Model,
    offer: Offer,
    models_dir: Path,
    sequences: int,
) -> serve.Application:
    """The Serve application of one replica, on exactly its node and GPUs."""
    place = replica.place
    drain_s = DRAIN_S if deployment.lease_id is None else LEASE_DRAIN_S
    logical = offer.logical or not place.gpu_indices
    settings = ReplicaSettings(
        model.name, deployment.engine, models_dir, place, logical, sequences, drain_s - CLOSE_S
    )
    slots = {slot_resource(place.node_id, i): place.gpu_milli / 1000 for i in place.gpu_indices}
    served = serve.deployment(
        name="replica",
        num_replicas=1,
        max_ongoing_requests=ONGOING_MAX,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=drain_s,
        ray_actor_options={
            "num_cpus": 0 if slots else REPLICA_CPUS,
            "num_gpus": 0,
            "resources": slots,
            "label_selector": {NODE_LABEL: place.node_id},
            "runtime_env": {"env_vars": replica_environment(replica, offer)},
        },
    )(ModelReplica)
    return served.bind(settings)


def replica_environment(replica: Replica, offer: Offer) -> dict[str, str]:
    """What marks a replica's process tree, and which GPUs it sees. Nothing secret."""
    place = replica.place
    variables = {REPLICA_VARIABLE: replica.replica_id, NODE_VARIABLE: place.node_id}
    if place.gpu_indices and not offer.logical:
        # The slot is the authority: Ray must not blank or change what we say here.
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, place.gpu_indices))
        variables["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    return variables


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
