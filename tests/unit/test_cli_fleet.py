"""The commands for leases, nodes and status: the real HTTP surface behind them, no Ray."""

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace

import httpx
import pytest
import rich.progress
import typer
from hypothesis import given
from hypothesis import strategies as st

from market import catalog, pricing
from market.cli import bars, deployments, leases, nodes
from market.cli.main import app, main
from market.cluster import hardware, supervisor
from market.config import Config
from market.fakes import FakeClock, FakeCluster
from market.keys import hash_key
from market.ledger.producer import send
from market.ledger.service import Ledger
from market.scheduler.service import Scheduler
from market.types import (
    AppStatus,
    Gpu,
    Offer,
    OrderState,
    Principal,
    Role,
    StoredModel,
    StoredState,
)
from serve_apps.auth import Authenticator
from serve_apps.fleet_api import NewOrder
from serve_apps.http import Services, create_app
from tests.samples import ACME, deposit

URL = "http://market.example:8000"
REQUEST = httpx.request
KEYS = {"operator": Principal("key-op", Role.OPERATOR, "operator"), "acme": ACME}
JSON = ("--output", "json")
LEASE = ("deploy", "tiny-qwen", "--mode", "lease", "--tenant", "acme")


def later():
    return f"{datetime.now(UTC) + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"


class Market:
    """A scheduler, a ledger and HTTP in front of them; after each request a round passes."""

    def __init__(self, home):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.clock = FakeClock(datetime.now(UTC))
        self.cluster = FakeCluster({"farm"}, instant=True)
        config = Config(home / "operator", URL, node_patience_s=10)
        self.ledger = Ledger(config, self.clock)
        self.scheduler = Scheduler(
            config, self.clock, self.ledger, self.cluster, partial(send, self.ledger)
        )
        services = Services(
            config, self.clock, self.ledger, self.scheduler, None, None, None,
            Authenticator(self.ledger, self.clock), None, None, None,
            ray_access=lambda: ("10.0.0.1:6379", "ray-token"),
        )  # fmt: skip
        self.app = create_app(services)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app))
        self.asked = []
        self.then = []
        self.answers = True

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    async def open(self):
        await self.ledger.open()
        await self.scheduler._store.open()
        self.scheduler._core.rebuild_calendar()
        await self.ledger.create_tenant("acme")
        for name, principal in KEYS.items():
            await self.ledger.add_key(principal, hash_key(name))
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

    async def clear(self):
        """As at the beginning, but for what is over."""
        for lease in await self.scheduler.leases():
            await self.scheduler.release(lease.lease_id)
        for order in await self.scheduler.orders():
            if order.state is OrderState.WAITING:
                await self.scheduler.cancel_order(order.order_id, None)
        for deployment, _ in await self.scheduler.deployments():
            if not deployment.stopping:
                await self.scheduler.undeploy(deployment.deployment_id)
        self.cluster.nodes = {"farm"}
        while await self.scheduler.deployments():
            await self.round()
        joined = [o for o in await self.scheduler.offers() if o.node_id != "farm"]
        await self.scheduler._store.save(gone=joined)
        self.asked, self.then, self.answers, self.cluster.instant = [], [], True, True

    def bodies(self, method="POST"):
        return [(path, body) for how, path, body in self.asked if how == method]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    made = Market(tmp_path_factory.mktemp("market"))
    made.do(made.open())
    yield made
    made.do(made.close())
    made.loop.call_soon_threadsafe(made.loop.stop)
    made.thread.join()
    made.loop.close()


@pytest.fixture
def market(running, tmp_path, monkeypatch):
    monkeypatch.setenv("MARKET_HOME", str(tmp_path))
    monkeypatch.setenv("MARKET_URL", URL)
    for module in (deployments, leases, nodes):
        monkeypatch.setattr(module, "POLL_S", 0.001)
    monkeypatch.setattr(httpx, "request", running.request)
    yield running
    running.do(running.clear())


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
        if code == 1 and typed is None:
            assert shown.err.splitlines()[-1].startswith("market: "), shown.err
        answer = json.loads(shown.out) if shown.out and "json" in arguments else None
        return SimpleNamespace(out=shown.out, err=shown.err, json=answer)

    return command


@pytest.fixture
def lease(market, run):
    """A lease of half a GPU that serves."""
    return run(*LEASE, "--gpus", "0.5", "--term", "2h", *JSON).json["lease"]


def use(milli, mode="lease", state="ready", model="tiny-qwen"):
    return {"model": model, "milli": milli, "mode": mode, "state": state}


class TestBars:
    @pytest.mark.parametrize(
        ("used", "drawn"),
        [
            ([], "·" * 20),
            ([use(500)], "#" * 10 + "·" * 10),
            ([use(1000, "tokens")], "=" * 20),
            ([use(1000, "hybrid")], "#" * 20),
            ([use(250), use(250, "tokens")], "#" * 5 + "=" * 5 + "·" * 10),
            ([use(500, state="freeing"), use(500, state="stopping")], "-" * 20),
            # A booking for later stands behind what runs now and takes what that leaves.
            ([use(1000, state="waiting"), use(750, "tokens")], "=" * 15 + "+" * 5),
            ([use(1000), use(500, state="waiting")], "#" * 20),
            # The smallest use and the smallest rest are seen.
            ([use(1)], "#" + "·" * 19),
            ([use(999)], "#" * 19 + "·"),
            ([use(333), use(333, "tokens"), use(333)], "#" * 7 + "=" * 6 + "#" * 6 + "·"),
        ],
    )
    def test_are_in_proportion(self, used, drawn):
        assert bars.bar(used) == drawn

    @given(st.lists(st.integers(1, 1000), max_size=30), st.integers(1, 40))
    def test_are_always_as_long_as_asked(self, shares, cells):
        drawn = bars.bar([use(milli) for milli in shares], cells)
        assert len(drawn) == cells
        full = sum(shares) >= 1000
        if len(shares) < cells:
            assert ("·" in drawn) is not full

    def test_lines_say_what_is_there(self):
        gpu = {"index": 3, "used": [use(500), use(250, "tokens", "starting", "smollm2-135m")]}
        assert bars.gpu_line(gpu) == (
            "gpu 3 [##########=====·····] 0.5 tiny-qwen lease, 0.25 smollm2-135m pool (starting)"
        )
        assert bars.gpu_line({"index": 0, "used": []}).endswith("] free")
        hybrid = {"index": 0, "used": [use(1000, "hybrid")]}
        assert bars.gpu_line(hybrid).endswith("1 tiny-qwen lease")

    @pytest.mark.parametrize(
        ("indices", "milli", "words"),
        [
            ((0,), 500, "gpu 0 x0.5"),
            ((1, 2), 1000, "gpu 1,2"),
            ((), 1000, "any gpu"),
            ((), 0, "cpus"),
        ],
    )
    def test_places(self, indices, milli, words):
        where = {"node_id": "farm", "gpu_indices": indices, "gpu_milli": milli}
        assert bars.place(where) == f"farm {words}"

    def test_times(self):
        noon = datetime(2026, 11, 1, 12, tzinfo=UTC)
        assert bars.moment("2026-11-01T13:30:00.5+01:00") == "2026-11-01 12:30:00 UTC"
        assert bars.remaining("2026-11-02T13:00:00Z", noon) == "1d 1h"
        assert bars.remaining("2026-11-01T12:00:00Z", noon) == "over"
        assert [bars.duration(s) for s in (0, 59, 3600, 3661)] == ["0s", "59s", "1h", "1h 1m"]


class TestQuote:
    def test_says_place_price_total_and_what_is_held(self, market, run):
        options = ("quote", "tiny-qwen", "--gpus", "0.5", "--term", "1d", "--tenant", "acme")
        quote = run(*options, *JSON).json
        assert (quote["fits"], quote["node_id"], quote["total"]) == (True, "farm", "25.2")
        shown = run(*options).out
        for words in ("farm gpu 0 x0.5", "2.1", "1.05", "25.2", bars.moment(quote["end"])):
            assert words in shown
        body = {"model": "tiny-qwen", "gpus": "0.5", "term": "1d", "tenant_id": "acme"}
        assert market.bodies() == [("/quotes", body)] * 2
        assert run(*LEASE, "--gpus", "0.5", "--term", "1d", "--dry-run").out == shown
        assert market.do(market.scheduler.leases()) == []

    def test_every_option_reaches_the_market(self, market, run):
        run("quote", "tiny-qwen", "--gpus", "2", "--term", "1h", "--tenant", "acme", "--resale",
            "--gpu-type", "a10", "--gpu-memory-gib", "20", "--region", "local", "--engine", "vllm",
            "--provider", "gpu-farm", "--max-price", "2.10", "--start", later())  # fmt: skip
        ((_, body),) = market.bodies()
        assert set(body) == set(NewOrder.model_fields) - {"order_id"}

    @pytest.mark.parametrize(
        "command", [("quote", "tiny-qwen", "--tenant", "acme"), (*LEASE, "--dry-run")]
    )
    @pytest.mark.parametrize("form", ["table", "json"])
    def test_what_does_not_fit_ends_with_1_and_the_reason(self, market, run, command, form):
        done = run(*command, "--gpu-type", "h100", "--output", form, code=1)
        assert done.err == ("market: no offer has room for 1 GPU(s): farm has a10, not h100\n")
        assert form == "table" or done.json["fits"] is False


class TestDeploy:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--gpus", "1"), "--gpus: is for --mode lease and hybrid only"),
            (("--tenant", "acme"), "--tenant: is for --mode lease and hybrid and auto only"),
            (("--order-id", "o"), "--order-id: is for --mode lease and hybrid only"),
            (("--queue",), "--queue: is for --mode lease and hybrid only"),
            (("--mode", "lease", "--replicas", "2"), "--replicas: is for --mode tokens only"),
            (("--cheap", "m"), "--cheap: is for --mode auto only"),
            (("--mode", "lease", "--spill-budget", "1"), "--spill-budget: is for --mode hybrid"),
            (("--mode", "auto", "--gpus", "1"), "--gpus: is for --mode lease and hybrid only"),
            (("--mode", "rent"), "rent: use tokens, lease, hybrid, auto"),
            (("--mode", "lease", "--start", "2h"), "'2h' is no time"),
        ],
    )
    def test_options_of_the_other_mode_are_wrong_usage(self, market, run, options, words):
        assert words in run("deploy", "tiny-qwen", *options, code=2).err
        assert market.asked == []

    def test_tokens_ask_for_what_was_said_and_wait(self, market, run):
        done = run("deploy", "tiny-qwen", "--replicas", "2", *JSON)
        assert (done.json["state"], done.json["ready"]) == ("ready", 1)
        assert market.bodies() == [
            ("/deployments", {"model": "tiny-qwen", "mode": "tokens", "replicas": "2"})
        ]
        run("deployments")
        shown = run("deployments").out
        assert "2/2" in shown
        assert "farm gpu 0 x0.042; farm gpu 0 x0.042" in shown

    def test_lease_serves_when_it_returns(self, market, run):
        done = run(*LEASE, "--gpus", "0.5", "--term", "2h", "--order-id", "once", *JSON)
        lease = done.json["lease"]
        assert (done.json["state"], done.json["order"]["order_id"]) == ("ready", "once")
        assert done.err.splitlines()[0] == (
            f"market: lease {lease['lease_id']}: farm gpu 0 x0.5 at 2.1 USD/GPU-hour, "
            f"{bars.moment(lease['start'])} to {bars.moment(lease['end'])}"
        )
        again = run(*LEASE, "--gpus", "0.5", "--term", "2h", "--order-id", "once")
        assert lease["lease_id"] in again.out
        assert "farm gpu 0 x0.5" in again.out
        assert len(market.do(market.scheduler.leases())) == 1
        run("leases", "release", lease["lease_id"], "--yes")
        refused = run(*LEASE, "--gpus", "0.5", "--term", "2h", "--order-id", "once", code=1)
        assert "closed (released by its holder); choose another --order-id" in refused.err

    def test_booking_for_later_is_not_waited_for(self, market, run):
        done = run(*LEASE, "--start", later(), *JSON)
        assert (done.json["state"], done.json["lease"]["state"]) == ("waiting", "pending")
        assert "any gpu" in run("leases", "ls").out

    def test_no_wait_returns_at_once(self, market, run):
        market.cluster.instant = False
        assert run(*LEASE, "--no-wait", *JSON).json["lease"]["state"] == "pending"
        assert "not ready after 0 s" in run(*LEASE, "--timeout-s", "0", code=1).err

    def test_replica_that_fails_says_why(self, market, run):
        market.cluster.instant = False

        def fail():
            for name in market.cluster.apps:
                market.cluster.apps[name] = AppStatus(None, True, "no memory")

        market.then = [fail, fail, fail]
        done = run(*LEASE, code=1)
        assert "no memory" in done.err.splitlines()[-1]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--gpu-type", "h100"), "farm has a10, not h100"),
            (("--gpus", "2", "--term", "1d", "--max-price", "2"), "2.1"),
            (("--gpus", "1.5"), "a number of whole GPUs, or a share"),
            (("--term", "soon"), "no duration such as 30d"),
        ],
    )
    def test_refusals_are_one_line(self, market, run, options, words):
        done = run(*LEASE, *options, code=1)
        assert words in done.err
        assert done.err.count("\n") == 1

    def test_key_of_a_tenant_needs_no_name(self, market, run):
        done = run("deploy", "tiny-qwen", "--mode", "lease", *JSON, key="acme")
        assert done.json["tenant_id"] == "acme"
        assert "for whom it is (--tenant NAME)" in run(*LEASE[:4], code=1).err

    def test_hybrid_is_a_lease_that_spills(self, market, run):
        hybrid = (*LEASE[:2], "--mode", "hybrid", "--tenant", "acme")
        assert "no pool of tiny-qwen" in run(*hybrid, code=1).err
        run("deploy", "tiny-qwen")
        done = run(*hybrid, "--spill-budget", "0.5", "--ttft", "1.5", *JSON)
        assert (done.json["mode"], done.json["state"]) == ("hybrid", "ready")
        policy = done.json["policy"]
        assert (policy["spill_budget"], policy["ttft_s"]) == ("0.5", 1.5)
        assert "hybrid" in run("deployments").out
        again = run(*hybrid, "--order-id", "another", code=1)
        assert "deployed as hybrid" in again.err

    def test_auto_is_a_name_of_ones_own(self, market, run):
        auto = ("deploy", "smart", "--mode", "auto", "--tenant", "acme")
        models = ("--cheap", "smollm2-135m", "--strong", "tiny-qwen")
        done = run(*auto, *models, "--cost-target", "0.3", *JSON)
        assert (done.json["mode"], done.json["state"]) == ("auto", "ready")
        assert done.json["policy"]["cost_target"] == 0.3
        run(*auto, *models)
        rows = run("deployments", *JSON).json
        assert [row["policy"]["cost_target"] for row in rows] == [0.5]
        assert "for whom" in run(*auto[:-2], *models, code=1).err
        assert run("undeploy", "smart", *JSON).json["state"] == "removed"


class TestQueue:
    FULL = (*LEASE, "--gpus", "2", "--term", "1h")

    def test_order_is_matched_when_room_is_made(self, market, run, lease):
        market.then = [lambda: None] * 2 + [
            lambda: market.do(market.scheduler.release(lease["lease_id"]))
        ]
        done = run(*self.FULL, "--queue", *JSON)
        assert "waits: no offer has room for 2 GPU(s): farm has 1 of 2 GPUs free" in done.err
        assert (done.json["state"], done.json["lease"]["gpu_indices"]) == ("ready", [0, 1])
        assert done.json["order"]["order_id"] == done.json["lease"]["order_id"]

    def test_timeout_leaves_it_queued_until_it_is_cancelled(self, market, run, lease):
        done = run(*self.FULL, "--queue", "--order-id", "q1", "--timeout-s", "0", code=1)
        assert "still waits after 0 s" in done.err
        assert "market leases cancel-order q1 takes it back" in done.err
        shown = run("status").out
        assert "q1" in shown
        assert "farm has 1 of 2 GPUs free" in shown
        assert "cancelled" in run("leases", "cancel-order", "q1").out
        assert "q1" not in run("status").out
        assert "no order 'q2'" in run("leases", "cancel-order", "q2", code=1).err

    def test_no_wait_shows_the_order(self, market, run, lease):
        done = run(*self.FULL, "--queue", "--no-wait", "--order-id", "q3")
        assert "q3" in done.out
        assert "waiting" in done.out

    def test_order_taken_back_meanwhile(self, market, run, lease):
        market.then = [lambda: market.do(market.scheduler.cancel_order("q4", None))]
        done = run(*self.FULL, "--queue", "--order-id", "q4", code=1)
        assert done.err.endswith("market: order q4 was taken back while it waited\n")


class TestUndeploy:
    def test_pool_ends_without_a_question(self, market, run, lease):
        run("deploy", "tiny-qwen")
        answer = run("undeploy", "tiny-qwen", *JSON).json
        assert (answer["model"], answer["state"]) == ("tiny-qwen", "removed")
        (left,) = run("deployments", *JSON).json
        assert left["deployment_id"] == lease["lease_id"]
        assert "'qwen-7b' is not deployed" in run("undeploy", "qwen-7b", code=1).err

    @pytest.mark.parametrize("command", [("undeploy", "tiny-qwen"), ("leases", "release", "LEASE")])
    def test_lease_ends_only_after_a_yes(self, market, run, lease, command):
        name = lease["lease_id"]
        command = [name if word == "LEASE" else word for word in command]
        assert "say so with --yes" in run(*command, code=1).err
        refused = run(*command, typed="\n", code=1)
        question = f"End lease {name} of acme on farm gpu 0 x0.5 now, before "
        assert question in refused.err
        assert refused.err.endswith("nothing was changed\n")
        assert [kept.lease_id for kept in market.do(market.scheduler.leases())] == [name]
        run(*command, typed="y\n")
        assert market.do(market.scheduler.leases()) == []
        assert "released" in run("leases", "ls", "--all").out

    def test_yes_is_not_asked(self, market, run, lease):
        run("undeploy", lease["lease_id"], "--yes")
        assert run("deployments").out == "no deployments\n"

    def test_several_leases_must_be_named(self, market, run, lease):
        other = run(*LEASE, "--gpus", "0.25", *JSON).json["lease"]["lease_id"]
        error = run("undeploy", "tiny-qwen", "--yes", code=1).err
        assert lease["lease_id"] in error
        assert other in error

    def test_tenant_beside_a_pool_is_told_how(self, market, run, lease):
        run("deploy", "tiny-qwen")
        error = run("undeploy", "tiny-qwen", "--yes", code=1, key="acme").err
        assert f"its leases are ended by their ids: {lease['lease_id']}" in error
        assert len(market.do(market.scheduler.deployments())) == 2


class TestLeases:
    def test_show_renew_and_list(self, market, run, lease):
        name = lease["lease_id"]
        assert run("leases", "ls", *JSON).json == [run("leases", "show", name, *JSON).json]
        shown = run("leases", "show", name).out
        assert "price per gpu hour" in shown
        end = datetime.fromisoformat(lease["end"]) + timedelta(days=7)
        assert bars.moment(end.isoformat()) in run("leases", "renew", name, "--term", "7d").out
        assert market.bodies()[-1] == (f"/leases/{name}/renew", {"term": "7d"})
        assert "at most 182 days" in run("leases", "renew", name, "--term", "52w", code=1).err
        row = run("leases", "ls").out
        assert all(
            words in row for words in (name, "farm gpu 0 x0.5", "active", "2.1 USD/GPU-hour")
        )

    def test_terms_may_be_changed_and_what_is_left_out_stays(self, market, run):
        run("deploy", "tiny-qwen")
        hybrid = (*LEASE, "--mode", "hybrid", "--spill-budget", "5", "--ttft", "1.5")
        name = run(*hybrid, *JSON).json["lease"]["lease_id"]

        def policy():
            return next(d for d in run("deployments", *JSON).json if d["lease_id"] == name)[
                "policy"
            ]

        told = run("leases", "set", name, "--spill-budget", "0.5").err
        assert "spills for at most 0.5 a day, beyond 1.5 s to the first token" in told
        assert (policy()["spill_budget"], policy()["ttft_s"]) == ("0.5", 1.5)
        changed = run("leases", "set", name, "--spill-budget", "none", "--resale", *JSON).json
        assert (changed["policy"]["spill_budget"], changed["resale"]) == (None, True)
        assert policy() == changed["policy"]
        (rule,) = market.do(market.scheduler.routes()).rules
        assert (rule.policy.spill_pico, rule.policy.ttft_s) == (None, 1.5)
        assert run("leases", "set", name, "--no-resale", *JSON).json["resale"] is False
        assert "nothing to change" in run("leases", "set", name, code=1).err
        assert "spill_budget" in run("leases", "set", name, "--spill-budget", "-1", code=1).err
        run("leases", "release", name, "--yes")
        assert "is over" in run("leases", "set", name, "--resale", code=1).err

    def test_plain_lease_has_no_policy_to_change(self, market, run, lease):
        name = lease["lease_id"]
        assert "is no hybrid" in run("leases", "set", name, "--ttft", "1", "--resale", code=1).err
        assert run("leases", "show", name, *JSON).json["resale"] is False
        run("leases", "set", name, "--resale")
        assert run("leases", "show", name, *JSON).json["resale"] is True

    def test_unknown_lease(self, market, run):
        for command in (
            ("show",),
            ("release", "--yes"),
            ("renew", "--term", "1d"),
            ("set", "--resale"),
        ):
            assert "no lease 'lease-0'" in run("leases", *command, "lease-0", code=1).err
        assert "no leases; try" in run("leases", "ls").out


class TestStatus:
    def test_shows_nodes_deployments_leases_and_ledger(self, market, run, lease):
        run("deploy", "tiny-qwen")
        shown = run("status").out
        for words in (
            "farm   provider gpu-farm, 2 x a10 24 GiB (logical), ask 2.1 USD/GPU-hour",
            "gpu 0 [##########=·········] 0.5 tiny-qwen lease, 0.042 tiny-qwen pool",
            "gpu 1 [····················] free",
            bars.LEGEND,
            "farm gpu 0 x0.042",
            "1h 59m",
            "open holds",
        ):
            assert words in shown, words
        assert set(run("status", *JSON).json) >= {"offers", "leases", "orders", "deployments"}

    def test_lost_and_left_nodes_and_alarms(self, market, run, monkeypatch):
        market.cluster.nodes = set()
        run("status")
        assert "lost: it does not answer; it was open" in run("status").out
        answer = run("status", *JSON).json
        answer["offers"][0]["state"] = "left"
        answer["ledger"]["alarms"] = [{"name": "lag", "about": "gw0", "detail": "9 s"}]
        answer["ledger"]["has_room"] = False
        monkeypatch.setattr(httpx, "request", lambda *_a, **_o: httpx.Response(200, json=answer))
        shown = run("status").out
        assert "no nodes; try: market join" in shown
        assert "ALARM    lag of gw0: 9 s" in shown
        assert "ALARM    the ledger's disk is full" in shown
        assert run("offers", *JSON).json == answer

    def test_address_or_key_that_cannot_be_is_said_in_a_line(self, market, run, monkeypatch):
        assert "MARKET_API_KEY is no key" in run("status", code=1, key="clé").err
        monkeypatch.setattr(httpx, "request", REQUEST)
        assert "is no address" in run("leases", "show", "a\x01b", code=1).err
        for url in ("http://[::1", "http://market.example:99999"):
            monkeypatch.setenv("MARKET_URL", url)
            assert f"MARKET_URL={url!r} is no address" in run("status", code=1).err

    def test_nobody_answers(self, market, run):
        market.answers = False
        assert f"no market answers at {URL}" in run("status", code=1).err


class TestNodes:
    JOIN = ("join", "--provider", "gpu-farm", "--ask", "0.20")
    REAL = (Gpu(0, "h100", 81_920), Gpu(1, "h100", 81_920), Gpu(2, "a10", 24_564))

    @pytest.fixture(autouse=True)
    def machine(self, market, monkeypatch):
        """No GPUs; joining asks the market as the supervisor does, ending is written down."""
        self.begun, self.ended, self.residents = [], [], []

        def begin_join(state_dir, logs_dir, url, token, facts):
            self.begun.append((url, token, facts))
            known = supervisor.load_membership(state_dir)
            wanted = supervisor.Membership(url, facts, token)
            member = supervisor._admit(known, wanted)
            supervisor._save(state_dir, member)
            market.cluster.nodes.add(member.node_id)
            market.do(market.round())
            return member.node_id

        monkeypatch.setattr(supervisor, "begin_join", begin_join)
        monkeypatch.setattr(
            supervisor, "end_join", lambda folder: self.ended.append(folder) or True
        )
        monkeypatch.setattr(httpx, "post", partial(market.request, "POST"))
        monkeypatch.setattr(nodes.socket, "gethostname", lambda: "box_7.example")
        monkeypatch.setattr(hardware, "gpus", lambda: ())
        here = lambda *_where: self.residents.pop(0) if self.residents else set()  # noqa: E731
        monkeypatch.setattr(nodes, "_replicas_here", here)

    @pytest.fixture
    def token(self, run):
        done = run("providers", "token", "gpu-farm", *JSON)
        assert f"market join {URL} --provider gpu-farm --ask PRICE --token TOKEN" in done.err
        return done.json["join_token"]

    def test_join_declares_logical_gpus_and_says_so(self, market, run, token):
        until = later()
        node = run(*self.JOIN, "--gpus", "2", "--gpu-memory-gib", "16", "--min-term", "1h",
                   "--until", until, "--token", token, "--region", "eu", *JSON)  # fmt: skip
        assert "these 2 are logical" in node.err
        (offer,) = [o for o in run("offers", *JSON).json if o["node_id"] == node.json["node_id"]]
        assert (offer["node_id"], offer["state"], offer["logical"]) == (
            "gpu-farm-box-7", "open", True
        )  # fmt: skip
        assert [g["memory_mib"] for g in offer["gpus"]] == [16_384] * 2
        assert (offer["region"], offer["term_min_s"], offer["ask"]) == ("eu", 3600, "0.2")
        shown = run("offers").out
        assert "2 x logical 16 GiB (logical), ask 0.2 USD/GPU-hour, region eu, open" in shown
        assert f"terms 1h to 182d, until {bars.moment(until)}" in shown

    def test_join_again_needs_no_token_and_keeps_the_name(self, market, run, token):
        run(*self.JOIN, "--gpus", "1", "--node", "blue-1", "--token", token)
        again = run(*self.JOIN, "--gpus", "1", "--gpu-type", "a10", URL, *JSON)
        assert again.json["node_id"] == "blue-1"
        assert again.json["gpus"] == [asdict(Gpu(0, "a10", 24 * 1024))]
        used = run(*self.JOIN, "--gpus", "1", "--node", "blue-2", "--token", token, code=1)
        assert "was used by node blue-1" in used.err

    def test_join_without_a_token_says_where_to_get_one(self, market, run):
        error = run(*self.JOIN, "--gpus", "1", code=1).err.splitlines()[-1]
        assert "a join token is needed; on the operator's machine" in error
        assert "run market providers token gpu-farm, then here the same again" in error
        wrong = run(*self.JOIN, "--gpus", "1", "--token", "join-x", code=1).err
        assert "not one of provider gpu-farm (market providers token gpu-farm)" in wrong
        error = run("providers", "token", "nobody", code=1).err
        assert "market providers create nobody" in error

    def test_real_gpus_are_taken_from_the_driver(self, market, run, monkeypatch, token):
        monkeypatch.setattr(hardware, "gpus", lambda: self.REAL)
        assert "GPUs of one type" in run(*self.JOIN, code=1).err
        assert "here are 0 (h100), 1 (h100), 2 (a10)" in run(*self.JOIN, "--gpus", "3", code=1).err
        assert "real ones" in run(*self.JOIN, "--gpu-type", "b200", code=1).err
        done = run(*self.JOIN, "--gpus", "0,1", "--token", token, "--node", "real-1", *JSON)
        assert (done.json["gpu_type"], done.json["logical"]) == ("h100", False)
        assert [gpu["index"] for gpu in done.json["gpus"]] == [0, 1]
        assert "logical" not in done.err

    def test_machine_without_gpus_may_offer_its_cpus(self, market, run, token):
        done = run(*self.JOIN, "--token", token, "--node", "cpus-1", *JSON)
        assert (done.json["gpu_type"], done.json["gpus"]) == ("cpu", [])
        assert "--gpus N declares N logical GPUs" in done.err
        for wrong in (("--gpus", "0,1"), ("--gpus", "0"), ("--gpu-memory-gib", "8")):
            run(*self.JOIN, *wrong, code=1)
        assert len(self.begun) == 1
        assert "no address such as" in run(*self.JOIN, "ftp://x", code=1).err
        assert "is no time" in run(*self.JOIN, "--until", "30d", code=2).err

    def test_drain_and_back(self, market, run):
        assert "draining" in run("drain", "farm").out
        assert "farm is draining" in run(*LEASE, code=1).err
        assert run("drain", "farm", "--back", *JSON).json["state"] == "open"
        assert "node 'x' is unknown; known: " in run("drain", "x", code=1).err

    def test_leave_waits_for_the_end_of_replicas(self, market, run, token):
        run(*self.JOIN, "--gpus", "1", "--token", token, "--node", "green-1")
        self.residents = [{"lease-1-0"}, {"lease-1-0"}]
        done = run("leave", *JSON)
        assert done.json == {"node_id": "green-1", "market": URL, "state": "left"}
        assert done.err.count("waiting for the end of lease-1-0") == 1
        assert len(self.ended) == 1
        assert "green-1   left" in run("offers").out
        self.residents = [{"lease-1-0"}] * 3
        assert "still run after 0 s" in run("leave", "--timeout-s", "0", code=1).err
        assert len(self.ended) == 1
        run("leave", "--timeout-s", "0", "--force")
        assert len(self.ended) == 2

    def test_leave_with_leases_needs_force(self, market, run, token):
        run(*self.JOIN, "--gpus", "1", "--token", token, "--node", "red-1", "--region", "red")
        lease = run(*LEASE, "--region", "red", *JSON).json["lease"]
        assert "1 lease(s) are on node red-1" in run("leave", code=1).err
        assert self.ended == []
        run("leave", "--force")
        closed = run("leases", "show", lease["lease_id"], *JSON).json
        assert (closed["state"], closed["close_reason"]) == ("closed", "node_left")

    def test_leave_without_a_market(self, market, run, token):
        assert "is MARKET_HOME right?" in run("leave", code=1).err
        run(*self.JOIN, "--gpus", "1", "--token", token, "--node", "grey-1")
        market.answers = False
        assert "try later, or leave without a word: --force" in run("leave", code=1).err
        assert self.ended == []
        assert "leaving without a word" in run("leave", "--force").err
        assert len(self.ended) == 1


def test_every_command_shows_an_example():
    def leaves(command, name):
        for sub in getattr(command, "commands", {}).values():
            yield from leaves(sub, f"{name} {sub.name}")
        if not hasattr(command, "commands"):
            yield name, command.epilog

    for name, epilog in leaves(typer.main.get_command(app), "market"):
        assert epilog.startswith("Example"), name
        assert name in epilog


def test_replicas_are_found_by_their_environment(tmp_path):
    marks = {"MARKET_NODE": "n1", "MARKET_NODE_RECORD": str(tmp_path / "worker.json")}
    command = [sys.executable, "-c", "print(flush=True); input()"]
    for node, found in (("n1", {"r-0"}), ("n2", set())):
        marked = os.environ | marks | {"MARKET_REPLICA": "r-0", "MARKET_NODE": node}
        with subprocess.Popen(command, env=marked, stdin=-1, stdout=-1) as process:
            process.stdout.readline()
            assert nodes._replicas_here(tmp_path, "n1") == found
            process.communicate(b"\n")
    assert nodes._replicas_here(tmp_path, "n1") == set()


STUCK = StoredModel("qwen-0.5b", StoredState.PULLING, 5, 9, 0.0)


class TestStoredModels:
    def test_pulled_listed_and_removed(self, market, run):
        assert "no models on disk" in run("models", "ls", "--stored").out
        done = run("models", "pull", "qwen-0.5b", "--pin", *JSON)
        assert [(row["node_id"], row["state"]) for row in done.json] == [("farm", "ready")]
        assert done.json[0]["pinned"] is True
        assert run("models", "pull", "qwen-0.5b", *JSON).json[0]["pinned"] is True
        done = run("models", "pull", "qwen-0.5b", "--no-pin", *JSON)
        assert done.json[0]["pinned"] is False
        shown = run("models", "ls", "--stored").out
        assert "qwen-0.5b" in shown
        assert "ready" in shown
        assert run("models", "rm", "qwen-0.5b", *JSON).json["freed_bytes"]["farm"] > 0
        assert "on no disk" in run("models", "rm", "qwen-0.5b", code=1).err

    def test_bar_of_each_node_shows_how_far_its_pull_is(self, market, run, monkeypatch):
        stored = StoredModel("qwen-0.5b", StoredState.PULLING, 0, 9, 0.0)
        disk, seen = market.cluster.disks["farm"], []
        update = rich.progress.Progress.update

        def shown(progress, bar, **options):
            update(progress, bar, **options)
            (task,) = progress.tasks
            seen.append((task.description, task.completed, task.total))
            steps = {0: (4, StoredState.PULLING), 4: (9, StoredState.READY)}
            if task.completed in steps:
                size, state = steps[task.completed]
                disk["qwen-0.5b"] = replace(stored, bytes=size, state=state)

        disk["qwen-0.5b"] = stored
        monkeypatch.setattr(market.cluster, "pull", lambda model, offer, pin, evict: None)
        monkeypatch.setattr(rich.progress.Progress, "update", shown)
        monkeypatch.setattr("market.cli.models.POLL_S", 0.01)
        run("models", "pull", "qwen-0.5b")
        assert seen == [("qwen-0.5b on farm", size, 9) for size in (0, 4, 9)]

    def test_failed_pull_says_why(self, market, run, monkeypatch):
        failed = StoredModel("qwen-0.5b", StoredState.FAILED, 0, 9, 0.0, message="no route to host")
        market.cluster.disks["farm"]["qwen-0.5b"] = failed
        monkeypatch.setattr(market.cluster, "pull", lambda model, offer, pin, evict: None)
        refused = run("models", "pull", "qwen-0.5b", code=1).err
        assert "qwen-0.5b was not pulled to farm: no route to host" in refused

    def test_pull_that_never_gets_on_is_given_up(self, market, run, monkeypatch):
        broken = StoredModel("qwen-0.5b", StoredState.PARTIAL, 5, 9, 0.0)
        market.cluster.disks["farm"]["qwen-0.5b"] = broken
        monkeypatch.setattr(market.cluster, "pull", lambda model, offer, pin, evict: None)
        monkeypatch.setattr("market.cli.models.POLL_S", 0.01)
        assert "breaks off again and again" in run("models", "pull", "qwen-0.5b", code=1).err

    def test_node_that_is_named_twice_is_one(self, market, run):
        nodes = ("--node", "farm", "--node", "farm")
        (row,) = run("models", "pull", "qwen-0.5b", *nodes, *JSON).json
        assert row["state"] == "ready"

    @pytest.mark.parametrize("there", [{}, {"qwen-0.5b": STUCK}])
    def test_node_that_says_nothing_new_is_given_up(self, market, run, monkeypatch, there):
        market.cluster.disks["farm"] = there
        monkeypatch.setattr(market.cluster, "pull", lambda model, offer, pin, evict: None)
        monkeypatch.setattr("market.cli.models.POLL_S", 0.01)
        monkeypatch.setattr("market.cli.models.QUIET_S", 0.1)
        assert "from farm" in run("models", "pull", "qwen-0.5b", code=1).err

    def test_pull_whose_process_died_is_asked_for_again(self, market, run, monkeypatch):
        broken = StoredModel("qwen-0.5b", StoredState.PARTIAL, 5, 9, 0.0)
        market.cluster.disks["farm"]["qwen-0.5b"] = broken
        pull, asked = market.cluster.pull, []

        def dies_once(model, offer, **options):
            asked.append(model.name)
            if len(asked) > 1:
                pull(model, offer, **options)

        monkeypatch.setattr(market.cluster, "pull", dies_once)
        done = run("models", "pull", "qwen-0.5b", *JSON)
        assert (done.json[0]["state"], len(asked)) == ("ready", 2)

    def test_only_the_operator(self, market, run):
        assert "operator" in run("models", "pull", "qwen-0.5b", code=1, key="acme").err

    def test_wrong_names(self, market, run):
        assert (
            "no node 'nowhere'"
            in run("models", "pull", "qwen-0.5b", "--node", "nowhere", code=1).err
        )
        assert "not in the catalog" in run("models", "pull", "nothing", code=1).err


class TestCatalog:
    ADD = ("models", "add", "--input-price", "0.10", "--output-price", "0.40")

    def test_added_shown_deployed_and_forgotten(self, market, run, tiny_model):
        source = ("--source", str(tiny_model))
        done = run(*self.ADD, "ours", *source, "--cached-input-price", "0.050", *JSON).json
        assert (done["created"], done["model"], done["source"]) == (True, "ours", source[1])
        assert (done["parameters"], done["context_tokens"]) == (1_050_752, 2048)
        prices = [done[f"{kind}_price"] for kind in ("input", "cached_input", "output")]
        assert prices == ["0.1", "0.05", "0.4"]
        (shown,) = [row for row in run("models", "ls", *JSON).json if row["model"] == "ours"]
        assert done == {"created": True, **shown}
        assert str(tiny_model) in run("models", "ls").out
        market.clock.advance(1)
        run("prices", "set", "ours", "--input", "0.20", "--output-price", "0.80")
        again = run(
            *self.ADD, "ours", "--source", str(tiny_model), *JSON, "--cached-input-price", "0.05"
        )
        assert (again.json["created"], again.json["output_price"]) == (False, "0.8")
        assert run("deploy", "ours", *JSON).json["state"] == "ready"
        assert "in use by deployment" in run("models", "forget", "ours", code=1).err
        run("undeploy", "ours")
        while market.do(market.scheduler.deployments()):
            market.do(market.round())
        assert "forgotten" in run("models", "forget", "ours").out
        assert "ours" not in run("models", "ls").out.split()
        assert "not in the catalog" in run("deploy", "ours", code=1).err

    def test_table_says_what_was_read(self, market, run, tiny_embed):
        shown = run(*self.ADD, "vectors", "--source", str(tiny_embed), "--licence", "MIT").out
        assert {"vectors", "MIT", "1M", "512", "0.4"} <= set(shown.split())
        run("models", "forget", "vectors")

    @pytest.mark.parametrize(
        ("name", "options", "words"),
        [
            ("Ours!", (), "model 'Ours!': use 1 to 63 of a-z"),
            ("qwen-7b", (), "shipped with the market"),
            ("ours", ("--input-price", "-1"), "cannot be negative"),
            ("ours", ("--output-price", "0.1234567"), "more than 6 decimals"),
            ("ours", ("--parameters", "5"), "leave --parameters out"),
            ("ours", ("--source", "nonsense"), "absolute path"),
            ("ours", ("--source", "/not/there"), "not there"),
        ],
    )
    def test_what_is_wrong_changes_nothing(self, market, run, tiny_model, name, options, words):
        before = run("models", "ls").out, run("prices", "show").out
        refused = run(*self.ADD, name, "--source", str(tiny_model), *options, code=1).err
        assert words in refused
        assert (run("models", "ls").out, run("prices", "show").out) == before

    def test_prices_are_needed(self, market, run, tiny_model):
        missing = ("models", "add", "ours", "--source", str(tiny_model), "--input-price", "1")
        assert "--output-price" in run(*missing, code=2).err

    def test_only_the_operator(self, market, run, tiny_model):
        asked = (*self.ADD, "ours", "--source", str(tiny_model))
        for command in (asked, ("models", "forget", "tiny-qwen")):
            assert "operator" in run(*command, code=1, key="acme").err
