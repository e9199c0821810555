"""The gateway as a Ray Serve deployment: wires the ports and serves HTTP."""

import asyncio
from functools import partial
from typing import Any

import ray
from ray import serve

from market import services
from market.clock import SystemClock
from market.cluster.node import OPERATOR_NODES
from market.config import Config
from market.inference import Inference
from market.ledger.producer import Producer
from serve_apps.auth import Authenticator
from serve_apps.http import Services, create_app
from serve_apps.live import LiveRoutes
from serve_apps.metrics import CountingSink, Metrics

ONGOING_MAX = 10_000
DRAIN_S = 60
# The slot of this market's one gateway replica: whichever process serves next takes it over,
# fences its predecessor and ends what that left open. (Serve's ranks move between replicas.)
PRODUCER = "gw0"


def ray_access(config: Config) -> tuple[str, str]:
    """Address and token of this cluster: what a node needs to join, and all it gets."""
    address = ray.get_runtime_context().gcs_address
    return address, (config.state_dir / "ray.token").read_text().strip()


@serve.ingress()
class Gateway:
    """One gateway replica: a producer of usage records with its own sequence."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Serve awaits it
        ledger, scheduler = services.ledger_client(), services.scheduler_client()
        clock = SystemClock()
        self._producer = Producer(ledger, PRODUCER, config.spool_dir, config.usage_sync)
        await self._producer.start()
        metrics = Metrics()
        routes = LiveRoutes(config, scheduler, ledger, serve.get_app_handle, metrics.unpriced)
        sink = CountingSink(self._producer, metrics)
        self._inference = Inference(clock, ledger, sink, routes)
        self._refreshing = asyncio.create_task(routes.refresh_forever())
        self._services = Services(
            config,
            clock,
            ledger,
            scheduler,
            routes,
            self._inference,
            Authenticator(ledger),
            metrics,
            partial(ray_access, config),
        )

    def __serve_build_asgi_app__(self) -> Any:
        """Serve calls this after the constructor."""
        return create_app(self._services)

    def check_health(self) -> None:
        """Raises MarketFault if usage can no longer be recorded; Serve then replaces us."""
        self._producer.check()

    async def __del__(self) -> None:
        """Every finished request is recorded before the replica ends."""
        self._refreshing.cancel()
        await self._inference.drain()
        await self._producer.stop()


def build_app(config: Config) -> serve.Application:
    """The gateway application, on operator nodes only."""
    deployment = serve.deployment(
        name="gateway",
        num_replicas=1,
        max_ongoing_requests=ONGOING_MAX,
        graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={"num_cpus": 0, "label_selector": OPERATOR_NODES},
    )(Gateway)
    return deployment.bind(config)
