"""A model replica: one engine inside one Ray Serve replica."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
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

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        """Stream an answer, in larger pieces the more answers are under way."""
        self._streams += 1
        try:
            chunks = coalesce(self._engine.generate(request), lambda: pause(self._streams))
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
        finally:
            self._streams -= 1

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
