"""A scheduler over real SQL, a ledger in memory and a cluster that does what the test says."""

import asyncio
import contextlib
from dataclasses import replace

from market import catalog, pricing
from market.config import Config
from market.fairness import PoolReport
from market.fakes import FakeClock, FakeCluster, MemoryLedger
from market.scheduler.service import Scheduler, deployment_state
from market.scheduler.shares import GatewayReport
from market.types import (
    Bounds,
    Gpu,
    Offer,
    Order,
)
from tests.samples import NOON, deposit

LAPTOP = Offer(
    "local", "local", "local", "cpu", (), 8, 16_000, pricing.parse_money("1"), "USD", NOON
)
FARM = replace(
    LAPTOP,
    offer_id="farm",
    node_id="farm",
    gpu_type="a10",
    gpus=(Gpu(0, "a10", 24_564), Gpu(1, "a10", 24_564)),
    logical=True,
)
HOUR = 3600


class Box:
    """Everything around a scheduler, which may be stopped and opened again."""

    def __init__(self, tmp_path, offers, spares=0):
        self.config = Config(tmp_path, "http://127.0.0.1:1", node_patience_s=10, spares=spares)
        self.clock = FakeClock()
        self.cluster = FakeCluster({offer.node_id for offer in offers}, instant=True)
        self.ledger = MemoryLedger(self.clock)
        self.offers = offers

    async def fill(self, amount="100"):
        for name in ("acme", "other"):
            await self.ledger.create_tenant(name)
            await self.ledger.transfer(deposit(amount, f"deposit-{name}", name))
        for name in ("local", "gpu-farm"):
            await self.ledger.create_provider(name)
        cards = [c for c in catalog.default_rate_cards() if c.model != "smollm2-360m"]
        await self.ledger.add_rate_cards(cards, only_new_models=False)

    async def send(self, identity, first_seq, records):
        return await self.ledger.append_records(*identity, first_seq, records)

    @contextlib.asynccontextmanager
    async def opened(self):
        scheduler = Scheduler(self.config, self.clock, self.ledger, self.cluster, self.send)
        await scheduler._store.open()
        scheduler._core.rebuild_calendar()
        for offer in self.offers:
            await scheduler.offer(offer)
        try:
            yield scheduler
        finally:
            await scheduler._keeper.stop()
            await scheduler._store.close()

    async def rounds(self, scheduler, seconds=0.0, step=5.0):
        """Let time pass in steps, a round after each."""
        await self.round(scheduler)
        while seconds > 0:
            self.clock.advance(min(step, seconds))
            seconds -= step
            await self.round(scheduler)

    async def round(self, scheduler):
        await scheduler._keeper.round()
        while scheduler._keeper._working:
            await asyncio.gather(*scheduler._keeper._working.values())

    async def charged(self, tenant="acme"):
        return sum(r.charge_pico for r in self.ledger.records if r.tenant_id == tenant)


async def pool(scheduler, model="tiny-qwen", engine=None, dry_run=False, **bounds):
    return await scheduler.open_pool(model, engine, Bounds(**bounds), dry_run)


def order(number=1, **changes):
    values = {
        "order_id": f"order-{number}",
        "tenant_id": "acme",
        "api_key_id": "key-acme",
        "model": "tiny-qwen",
        "engine": "transformers",
        "gpu_count": 1,
        "gpu_milli": 1000,
        "start": None,
        "term_s": HOUR,
        "created_at": NOON,
    }
    return Order(**values | changes)


async def lease(scheduler, number=1, **changes):
    placed = await scheduler.order(order(number, **changes))
    return await scheduler.lease(placed.lease_id)


async def states(scheduler):
    return [deployment_state(*found)[0] for found in await scheduler.deployments()]


class Demands:
    """A gateway that says what the test wants, once a second."""

    def __init__(self, box, scheduler):
        self.box, self.scheduler = box, scheduler

    async def __call__(self, seconds, cold=(), streams=(), borrowed=(), **running):
        """For so long; ``running`` is by model, with dashes for underscores."""
        for _ in range(seconds):
            pools = {
                name.replace("_", "-"): PoolReport(count, 0, {}, {}, frozenset(), {})
                for name, count in running.items()
            }
            report = GatewayReport(
                "gw0",
                1,
                pools,
                frozenset(),
                cold=dict(cold),
                streams=dict(streams),
                borrowed=dict(borrowed),
            )
            await self.scheduler.sync(report)
            self.box.clock.advance(1)
            await self.box.round(self.scheduler)
