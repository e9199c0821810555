"""The commands for leases, nodes and status: the real HTTP surface behind them, no Ray."""

import asyncio
import io
import json
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace

import httpx
import pytest

from market import catalog, pricing
from market.cli import bars, deployments, leases, nodes
from market.cli.main import app, main
from market.cluster import hardware, supervisor
from market.config import Config
from market.errors import InvalidRequest
from market.fakes import FakeClock, FakeCluster
from market.keys import hash_key
from market.ledger.producer import send
from market.ledger.service import Ledger
from market.scheduler.service import Scheduler
from market.types import AppStatus, Gpu, Offer, Principal, Role
from serve_apps.auth import Authenticator
from serve_apps.http import Services, create_app
from tests.samples import ACME, deposit

URL = "http://market.example:8000"
KEYS = {"operator": Principal("key-op", Role.OPERATOR, "operator"), "acme": ACME}
LEASE = ("deploy", "tiny-qwen", "--mode", "lease", "--tenant", "acme")


class Market:
    """A scheduler, a ledger and HTTP in front of them; after each request a round passes."""

    def __init__(self, home):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.clock = FakeClock(datetime.now(UTC))
        self.cluster = FakeCluster({"farm"}, instant=True)
        config = Config(home / "operator", URL, node_patience_s=10)
        self.ledger = Ledger(config, self.clock)
        self.scheduler = Scheduler(
            config, self.clock, self.ledger, self.cluster, partial(send, self.ledger)
        )
        services = Services(
            config, self.clock, self.ledger, self.scheduler, None, None,
            Authenticator(self.ledger), None, lambda: ("10.0.0.1:6379", "ray-token"),
        )  # fmt: skip
        transport = httpx.ASGITransport(create_app(services))
        self.client = httpx.AsyncClient(transport=transport)
        self.asked = []
        self.then = []
        self.answers = True

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    async def open(self):
        await self.ledger.open()
        await self.scheduler._store.open()
        self.scheduler._core.rebuild_calendar()
        for name, principal in KEYS.items():
            await self.ledger.add_key(principal, hash_key(name))
        await self.ledger.create_tenant("acme")
        await self.ledger.transfer(deposit("100"))
        await self.ledger.create_provider("gpu-farm")
        await self.ledger.add_rate_cards(catalog.default_rate_cards(), only_new_models=True)
        gpus = (Gpu(0, "a10", 24_564), Gpu(1, "a10", 24_564))
        ask_pico, now = pricing.parse_money("2.10"), self.clock.now()
        farm = Offer(
            "farm", "gpu-farm", "farm", "a10", gpus, 8, 16_000, ask_pico, "USD", now, logical=True
        )
        await self.scheduler.offer(farm)

    async def close(self):
        await self.scheduler._keeper.stop()
        await self.scheduler._store.close()
        await self.ledger.close()
        await self.client.aclose()

    async def round(self):
        keeper = self.scheduler._keeper
        await keeper.round()
        while keeper._working:
            await asyncio.gather(*keeper._working.values())

    def request(self, method, url, **options):
        """In place of httpx.request."""
        if not self.answers:
            raise httpx.ConnectError("refused")
        assert url.startswith(f"{URL}/market/v1"), url
        path = url.removeprefix(f"{URL}/market/v1")
        self.asked.append((method, path, options.get("json") or options.get("params")))
        answer = self.do(self.client.request(method, url, **options))
        self.do(self.round())
        if self.then:
            self.then.pop(0)()
        return answer


@pytest.fixture
def market(tmp_path, monkeypatch):
    monkeypatch.setenv("MARKET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MARKET_URL", URL)
    monkeypatch.setenv("MARKET_API_KEY", "operator")
    for module in (deployments, leases, nodes):
        monkeypatch.setattr(module, "POLL_S", 0.001)
    made = Market(tmp_path)
    made.do(made.open())
    monkeypatch.setattr(httpx, "request", made.request)
    yield made
    made.do(made.close())
    made.loop.call_soon_threadsafe(made.loop.stop)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command as a shell would; ``typed`` is what somebody at a terminal types."""

    def command(*arguments, code=0, typed=None, key="operator"):
        monkeypatch.setattr(sys, "argv", ["market", *arguments])
        monkeypatch.setenv("MARKET_API_KEY", key)
        terminal = io.StringIO(typed)
        terminal.isatty = lambda: typed is not None
        monkeypatch.setattr(sys, "stdin", terminal)
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert ended.value.code == code, shown
        if code == 1:
            assert shown.err.splitlines()[-1].startswith("market: "), shown.err
        return SimpleNamespace(
            out=shown.out,
            err=shown.err,
            json=json.loads(shown.out) if "json" in arguments else None,
        )

    return command


JSON = ("--output", "json")


def test_try(market, run):
    print(run("offers").out)
    a = run(*LEASE, "--gpus", "0.5", "--term", "2h")
    print(a.out, a.err)
    a = run("deploy", "tiny-qwen")
    print(a.out, a.err)
    print(run("status").out)
    print(run("deployments").out)
    print(run("leases", "ls").out)
    print(run("quote", "tiny-qwen", "--gpus", "0.25", "--term", "2d", "--tenant", "acme").out)
    print(run("quote", "tiny-qwen", "--gpus", "2", "--term", "2d", "--tenant", "acme", code=1).err)
    a = run(*LEASE, "--gpus", "1", "--queue", "--no-wait", "--order-id", "o1", "--gpu-type", "h100"); print(a.out, a.err)
    print(run("status").out)
    print(market.asked)
