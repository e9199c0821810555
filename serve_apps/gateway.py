"""The gateway as a Ray Serve deployment: wires the ports, listens itself, serves HTTP.

Ray Serve starts gateways, watches their health and replaces them. Requests do not pass through its
proxy, which costs each chunk a second way through Ray (scripts/bench_gateway.py measures it as the
bare Serve app): every gateway of a machine listens on the market's own port (SO_REUSEPORT), and the
kernel deals connections out.
"""

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import socket
from functools import partial
from pathlib import Path

import ray
import uvicorn
from ray import serve
from starlette.types import ASGIApp

from market import services
from market.clock import SystemClock
from market.cluster import directory
from market.cluster.node import LOCAL, OPERATOR_NODES
from market.config import Config
from market.errors import MarketError, MarketFault
from market.inference import Inference
from market.ledger.producer import Producer
from market.limits import Limits
from market.queueing import Queues
from market.scheduler.shares import GatewayReport
from market.scorer import load_scorer
from market.slicing import Slices
from market.types import RouteTable
from serve_apps.auth import Authenticator
from serve_apps.http import Services, create_app
from serve_apps.idempotency import Idempotency
from serve_apps.lanes import Lanes
from serve_apps.live import LiveRoutes
from serve_apps.metrics import CountingSink, Metrics
from serve_apps.observed import AccessLog, Watcher
from serve_apps.telemetry import start_telemetry, telemetry_wanted

logger = logging.getLogger(__name__)

DRAIN_S = 60
CLOSE_S = 5
BACKLOG = 2048
KEEP_ALIVE_S = 75
SLOTS_MAX = 64
SWEEP_S = 5.0


def ray_access(config: Config) -> tuple[str, str]:
    """Address and token of this cluster: what a node needs to join, and all it gets."""
    address = ray.get_runtime_context().gcs_address
    return address, (config.state_dir / "ray.token").read_text().strip()


class Gateway:
    """One gateway: a producer of usage records in a slot of its own, with slices and queues."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Serve awaits it
        ledger, scheduler = services.ledger_client(), services.scheduler_client()
        answers = services.answers_client()
        self._slot = Slot(config.spool_dir, config.node)
        clock, self._metrics = SystemClock(), Metrics()
        self._producer = Producer(ledger, self._slot.name, config.spool_dir, config.usage_sync)
        await self._producer.start()
        await answers.release(*self._producer.identity())
        self._clock, self._scheduler = clock, scheduler
        sink = CountingSink(self._producer, self._metrics)
        self._slices = Slices(clock, scheduler, ledger, sink)
        self._queues = Queues(clock)
        self._limits = Limits()
        keys = Authenticator(ledger, clock)
        self._routes = routes = LiveRoutes(
            config,
            self._exchange,
            ledger,
            lambda: keys.cards,
            directory.find,
            self._metrics.unpriced,
            self._metrics.started,
        )
        self._inference = Inference(clock, self._slices, self._queues, sink, routes)
        self._idempotency = Idempotency(answers, self._producer.identity)
        self._access_log = AccessLog(config.logs_dir, self._slot.name)
        self._telemetry = start_telemetry(self._slot.name) if telemetry_wanted() else None
        watchers: list[Watcher] = [self._access_log, self._metrics.refused]
        if self._telemetry is not None:
            watchers.append(self._telemetry)
        app = create_app(
            Services(
                config=config,
                clock=clock,
                ledger=ledger,
                scheduler=scheduler,
                routes=routes,
                lanes=Lanes(routes, self._queues.load, load_scorer(config.scorer)),
                inference=self._inference,
                authenticator=keys,
                limits=self._limits,
                idempotency=self._idempotency,
                metrics=self._metrics,
                watchers=tuple(watchers),
                ray_access=partial(ray_access, config),
            )
        )
        await keys.poll()
        await routes.refresh()
        loops = (
            routes.refresh_forever(),
            keys.poll_forever(),
            self._slices.keep_house_forever(),
            self._sweep_forever(),
        )
        self._loops = [asyncio.create_task(loop) for loop in loops]
        self._server, self._serving = listen_with(app, config)

    async def _exchange(self) -> RouteTable:
        """Tell the scheduler of us; take over what it says."""
        producer, epoch = self._producer.name, self._producer.epoch
        keys = self._limits.in_use(self._clock.monotonic())
        report = GatewayReport(
            producer,
            epoch,
            self._queues.reports(),
            keys,
            cold=self._routes.cold(),
            streams=self._routes.streams(),
            kv_used=self._routes.kv_used(),
            borrowed=self._routes.borrowed(),
        )
        orders = await self._scheduler.sync(report)
        self._queues.take_shares(orders.pools.items())
        self._limits.share(orders.key_gateways)
        self._slices.recall(orders.recalls)
        self._routes.know(orders.models)
        self._metrics.pools(self._queues.waiting())
        self._metrics.granted(self._slices.take_grants_asked())
        return orders.routes

    async def _sweep_forever(self) -> None:
        """See to what other gateways of this machine left that died and did not come back."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self._producer.sweep_others()
            except MarketError as error:
                logger.warning("not swept: %s", error)

    def check_health(self) -> None:
        """Raises MarketFault if usage can no longer be recorded; Serve then replaces us."""
        self._producer.check()
        if self._serving.done():
            raise MarketFault("the gateway no longer listens")

    async def __del__(self) -> None:
        """Every request is answered and recorded, and its money returned, before we end."""
        self._server.should_exit = True
        with contextlib.suppress(Exception):
            await self._serving
        await self._idempotency.drain()
        await self._inference.drain()
        for loop in self._loops:
            loop.cancel()
        await self._producer.flush()
        with contextlib.suppress(MarketError):
            await self._slices.close()
        await self._producer.stop()
        if self._telemetry is not None:
            await asyncio.to_thread(self._telemetry.shutdown)
        self._access_log.close()
        self._slot.close()


class Slot:
    """A stable name for one of this machine's gateways, held by a file lock.

    Whoever takes a slot after its holder died fences it and sees to what it left.
    """

    def __init__(self, folder: Path, node: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        prefix = "gw" if node == LOCAL else f"gw-{node}-"
        for number in range(SLOTS_MAX):
            self.name = f"{prefix}{number}"
            self._file = os.open(folder / f"{self.name}.slot", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                os.close(self._file)
        raise MarketFault(f"{SLOTS_MAX} gateways run on this machine already")

    def close(self) -> None:
        """Let another have it."""
        os.close(self._file)


def listen_with(app: ASGIApp, config: Config) -> tuple[uvicorn.Server, "asyncio.Task[None]"]:
    """Serve the application on the market's port from now on."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=DRAIN_S - CLOSE_S,
        )
    )
    listener = listen(config.http_host, config.http_port)
    # What lives now lives for ever: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    return server, asyncio.create_task(server.serve(sockets=[listener]))


def listen(host: str, port: int) -> socket.socket:
    """A socket that shares its port with the other gateways of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    return listener


def build_app(config: Config) -> serve.Application:
    """The gateway application, on operator nodes only."""
    deployment = serve.deployment(
        name="gateway",
        num_replicas=config.gateways,
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={
            "num_cpus": 0,
            "label_selector": OPERATOR_NODES,
            "runtime_env": {
                "env_vars": {"PROMETHEUS_MULTIPROC_DIR": str(config.state_dir / "metrics")}
            },
        },
    )(Gateway)
    return deployment.bind(config)
