"""A model replica: one engine inside one Ray Serve replica."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from ray import serve

from market.catalog import Model, find
from market.cluster.models import fetch
from market.cluster.node import NODE_LABEL
from market.types import Deployment, EngineChunk, EngineRequest, Offer
from serve_apps.engines.base import EngineSettings, start_engine
from serve_apps.engines.coalesce import coalesce, pause

REPLICA_CPUS = 0.5
ONGOING_MAX = 256
QUEUED_MAX = 512
CONSTRUCTOR_TRIES = 3
HEALTH_PERIOD_S = 2
HEALTH_TIMEOUT_S = 30
DRAIN_S = 60
TELL_EVERY_S = 10.0


class ModelReplica:
    """Loads a model and streams answers; everything else happens in the gateway."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it: running means loaded
        self, model: str, engine: str, gpu_milli: int, models_dir: Path
    ) -> None:
        entry = find(model)
        folder = await asyncio.to_thread(fetch, entry, models_dir, weights=True)
        settings = EngineSettings(folder, entry.served_context_tokens, gpu_milli / 1000)
        self._engine = await start_engine(engine, settings)
        self._streams = 0
        self._served_tokens = 0
        self._said_s = float("-inf")
        self._replica = uuid.uuid4().hex[:12]  # of this process: its count starts at zero

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        """Stream an answer, in larger pieces the more answers are under way."""
        self._streams += 1
        delivered = 0
        first = True
        try:
            chunks = coalesce(self._engine.generate(request), lambda: pause(self._streams))
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
            self._streams -= 1

    def _signed(self, chunk: EngineChunk, first: bool) -> EngineChunk:
        """The chunk with this replica's name, and now and then the tokens it has delivered."""
        now_s = time.monotonic()
        tells = chunk.finish_reason is not None and now_s - self._said_s > TELL_EVERY_S
        if tells:
            self._said_s = now_s
        if not (first or tells):
            return chunk
        served_tokens = self._served_tokens if tells else None
        return replace(chunk, replica=self._replica, served_tokens=served_tokens)

    async def check_health(self) -> None:
        """Raises EngineFailed if the engine cannot serve; Serve then replaces this replica."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        """End the engine's processes when the replica is drained."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.close()


def build_app(
    deployment: Deployment, model: Model, offer: Offer, models_dir: Path
) -> serve.Application:
    """The Serve application of one deployment, on the node of its offer."""
    replica = serve.deployment(
        name="replica",
        num_replicas=deployment.replicas,
        max_ongoing_requests=ONGOING_MAX,
        max_queued_requests=QUEUED_MAX,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={
            "num_cpus": 0 if deployment.gpu_milli else REPLICA_CPUS,
            "num_gpus": deployment.gpu_milli / 1000,
            "label_selector": {NODE_LABEL: offer.node_id},
        },
    )(ModelReplica)
    return replica.bind(model.name, deployment.engine, deployment.gpu_milli, models_dir)
