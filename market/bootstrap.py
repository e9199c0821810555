"""Brings a market up on this machine, and down.

Ray reads its authentication settings when it is imported: call ``node.enter_environment`` before
importing this module in a process that is not one of the cluster's own.
"""

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator

import httpx
import ray
from ray import serve
from ray.serve.config import ProxyLocation

from market import catalog, pricing
from market.clock import SystemClock
from market.cluster import hardware, node
from market.cluster.actors import start_service, stop_service
from market.cluster.serve import import_builder, run_application
from market.config import Config
from market.errors import InvalidRequest, MarketError, MarketFault
from market.services import (
    ANSWERS,
    LEDGER,
    SCHEDULER,
    answers_client,
    ledger_client,
    scheduler_client,
)
from market.types import CURRENCY, Offer, Principal, Role

GATEWAY = "gateway"
GATEWAY_APP = "serve_apps.gateway:build_app"
LOCAL = "local"
ASK_PER_GPU_HOUR = "1.00"
READY_TIMEOUT_S = 120
CLOSE_PATIENCE_S = 90

Report = Callable[[str], None]


def up(config: Config, operator_key_hash: str, operator_key_id: str, report: Report) -> None:
    """Bring the market up on this machine; what runs already is left as it is.

    Raises MarketFault if something does not start.
    """
    for folder in (config.home, config.state_dir, config.models_dir):
        folder.mkdir(parents=True, exist_ok=True)
    config.state_dir.chmod(0o700)
    head = node.load_head(config.state_dir)
    if head is None:
        _check_port_is_free(config)
        report("starting the Ray head node")
        cpus = max(node.LOGICAL_CPUS_MIN, hardware.cpu_count())
        indices = [gpu.index for gpu in hardware.gpus()]
        shutil.rmtree(config.state_dir / "metrics", ignore_errors=True)
        (config.state_dir / "metrics").mkdir()
        head = node.start_head(config.state_dir, config.logs_dir, cpus, len(indices), indices)
    with _connected(head):
        report("opening the ledger")
        start_service(LEDGER, "market.services:make_ledger", config)
        start_service(ANSWERS, "market.services:make_answers", config)
        operator = Principal(operator_key_id, Role.OPERATOR, "operator")
        asyncio.run(_register(operator, operator_key_hash))
        report("starting the gateway")
        # Before the scheduler, which would start Serve with other options to bring models back. No
        # proxy: gateways listen themselves.
        serve.start(proxy_location=ProxyLocation.Disabled)
        start_service(SCHEDULER, "market.services:make_scheduler", config)
        asyncio.run(scheduler_client().offer(local_offer(config)))
        app = import_builder(GATEWAY_APP)(config)
        if GATEWAY not in serve.status().applications:
            run_application(app, GATEWAY, route_prefix=None)
        _wait_until_ready(config)


async def _register(operator: Principal, key_hash: str) -> None:
    ledger = ledger_client()
    await ledger.create_provider(LOCAL)
    await ledger.add_key(operator, key_hash)
    await ledger.add_rate_cards(catalog.default_rate_cards(), only_new_models=True)


def local_offer(config: Config) -> Offer:
    """This machine as an offer of the provider ``local``."""
    gpus = hardware.gpus()
    return Offer(
        offer_id=LOCAL,
        provider_id=LOCAL,
        node_id=LOCAL,
        gpu_type=gpus[0].gpu_type if gpus else "cpu",
        gpus=gpus,
        cpu_count=hardware.cpu_count(),
        memory_mib=hardware.memory_mib(),
        ask_pico=pricing.parse_money(ASK_PER_GPU_HOUR),
        currency=CURRENCY,
        priced_at=SystemClock().now(),
        models_dir=str(config.models_dir),
    )


def down(config: Config, report: Report) -> bool:
    """End the market of this machine in good order; False if none runs.

    Desired deployments stay on record: the next ``up`` brings them back.
    """
    head = node.load_head(config.state_dir)
    if head is None:
        return False
    try:
        with _connected(head):
            report("draining the gateway")
            # What it cannot meter now is credited.
            with contextlib.suppress(MarketError, TimeoutError):
                asyncio.run(_within_patience(scheduler_client().close()))
            stop_service(SCHEDULER)
            with contextlib.suppress(Exception):  # a broken Serve must not keep us from sealing
                serve.delete(GATEWAY)
            report("sealing the ledger")  # which may take its time: it is all that is owed
            asyncio.run(ledger_client().close())
            stop_service(LEDGER)
            with contextlib.suppress(MarketError, TimeoutError):
                asyncio.run(_within_patience(answers_client().close()))
            stop_service(ANSWERS)
            report("stopping model replicas")
            serve.shutdown()
    finally:
        report("stopping the Ray head node")
        node.stop_head(head, config.state_dir)
    return True


async def _within_patience(closing: Awaitable[None]) -> None:
    """One service that hangs must not keep the others from ending in good order."""
    async with asyncio.timeout(CLOSE_PATIENCE_S):
        await closing


@contextlib.contextmanager
def _connected(head: node.HeadNode) -> Iterator[None]:
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init(
        address=head.address,
        namespace=node.NAMESPACE,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


def _check_port_is_free(config: Config) -> None:
    try:
        httpx.get(f"{config.url}/healthz", timeout=2)
    except httpx.TransportError:
        return
    raise InvalidRequest(
        f"something else answers at {config.url}; stop it or choose another address, "
        "e.g. MARKET_URL=http://127.0.0.1:8001"
    )


def _wait_until_ready(config: Config) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{config.url}/healthz", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    app = serve.status().applications.get(GATEWAY)
    raise MarketFault(f"the gateway did not answer at {config.url}: {app and app.message}")
