"""What a new user does by hand, through a full stop and a second start."""

import contextlib
import json
import sqlite3
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from market.pricing import to_decimal
from tests.e2e.conftest import free_port, running_market, wait_until

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def market(tmp_path_factory, tiny_model):
    with running_market(tmp_path_factory.mktemp("market"), tiny_model) as market:
        yield market


def sql_balance(home, tenant):
    """From the database itself, which only opens while no ledger runs."""
    with contextlib.closing(sqlite3.connect(home / "state" / "ledger.db")) as database:
        query = "select credits_pico, debits_pico, held_pico from accounts where account_id = ?"
        row = database.execute(query, (f"tenant:{tenant}",)).fetchone()
        credits, debits, held = map(int, row)
        assert held == 0
        return to_decimal(credits - debits)


class TestByHand:
    """In this order; each test goes on where the last one stopped."""

    def test_operator_key_is_private(self, market):
        assert (market.home / "operator.key").stat().st_mode & 0o777 == 0o600
        assert (market.home / "state").stat().st_mode & 0o777 == 0o700

    def test_up_again_is_harmless(self, market):
        pid = market.head().pid
        market.cli("up")
        assert market.head().pid == pid

    def test_catalog_has_prices(self, market):
        rows = {row["model"]: row for row in market.cli("models", "ls")}
        assert rows["qwen-7b"]["source"] == "Qwen/Qwen2.5-7B-Instruct"
        assert rows["tiny-qwen"]["output_price"] == "0.4"
        assert len(rows) > 12

    def test_models_on_disk_are_seen_by_the_nodes_agent(self, market):
        (row,) = market.cli("models", "pull", "tiny-qwen")
        assert (row["node_id"], row["state"]) == ("local", "by_hand")
        assert row["bytes"] == row["total_bytes"] > 1_000_000
        assert market.cli("models", "ls", "--stored") == [row]

    def test_offer_of_this_machine_is_there(self, market):
        (offer,) = market.cli("offers")
        assert (offer["provider_id"], offer["gpu_type"]) == ("local", "cpu")
        assert market.cli("providers", "ls") == [{"provider_id": "local"}]

    def test_model_that_does_not_fit_says_what_is_missing(self, market):
        done = market.run("deploy", "qwen-7b")
        assert done.returncode == 1
        assert "needs 1 GPU with 17 GiB free; this cluster has none" in done.stderr
        assert "what would fit: tiny-qwen" in done.stderr
        assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("deploy", "tiny-qwen", "--mode", "hybrid", "--tenant", "nobody"), "no pool of tiny"),
            (("models", "rm", "tiny-qwen"), "was put there by hand"),
            (("models", "pull", "tiny-qwen", "--node", "nowhere"), "no node 'nowhere'"),
            (("deploy", "tiny-qwen", "--mode", "lease", "--tenant", "nobody"), "local has no GPU"),
            (("deploy", "tiny-qwen", "--engine", "magic"), "unknown"),
            (("deploy", "tinyqwen"), "did you mean tiny-qwen"),
            (("undeploy", "tiny-qwen"), "not deployed"),
            (("tenants", "create", "No Spaces"), "use 1 to 63"),
            (("tenants", "deposit", "nobody", "1"), "does not exist"),
            (("keys", "create", "--tenant", "nobody"), "market tenants create nobody"),
        ],
    )
    def test_mistakes_are_one_line_and_change_nothing(self, market, arguments, words):
        done = market.run(*arguments)
        assert done.returncode == 1, done.stderr
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        assert market.cli("deployments") == []

    def test_wrong_usage_exits_with_2(self, market):
        assert market.run("deploy").returncode == 2
        assert market.run("deploy", "tiny-qwen", "--replicas", "none").returncode == 2

    def test_dry_run_deploys_nothing(self, market):
        deployment = market.cli("deploy", "tiny-qwen", "--dry-run")
        (place,) = deployment["places"]
        assert (place["offer_id"], deployment["engine"]) == ("local", "transformers")
        assert market.cli("deployments") == []

    def test_deploy_serves_when_it_returns(self, market):
        market.cli("tenants", "create", "acme")
        market.cli("tenants", "deposit", "acme", "10", "--id", "first")
        market.cli("tenants", "deposit", "acme", "10", "--id", "first")
        market.cli("keys", "create", "--tenant", "acme")
        assert (market.home / "chat.key").stat().st_mode & 0o777 == 0o600
        deployment = market.cli("deploy", "tiny-qwen", "--mode", "tokens")
        assert deployment["state"] == "ready"
        answer = market.cli("chat", "tiny-qwen", "What is a list?", "--max-tokens", "9")
        assert answer["usage"]["prompt_tokens"] > 0

    def test_deploy_again_returns_the_same(self, market):
        (before,) = market.cli("deployments")
        assert market.cli("deploy", "tiny-qwen")["deployment_id"] == before["deployment_id"]
        done = market.run("deploy", "tiny-qwen", "--engine", "vllm")
        assert done.returncode == 1
        assert "undeploy tiny-qwen first" in done.stderr

    def test_usage_balance_and_ledger_agree(self, market):
        (row,) = market.cli("usage", "--by", "model")
        balance = market.cli("tenants", "show", "acme")
        assert (row["model"], row["requests"]) == ("tiny-qwen", 1)
        assert Decimal(balance["balance"]) == 10 - Decimal(row["charge"])
        path = market.run("ledger", "path").stdout.strip()
        assert Path(path) == market.home / "ledger" / "usage"
        wait_until(lambda: len(market.ledger()) == 1, "the seal")
        assert market.ledger()["charge"].sum() == Decimal(row["charge"])

    def test_status_shows_it_all(self, market):
        status = market.cli("status")
        assert status["ledger"]["next_lsn"] == 2
        assert [d["state"] for d in status["deployments"]] == ["ready"]
        assert "tiny-qwen" in market.run("status").stdout

    def test_stop_and_start_bring_everything_back(self, market):
        wait_until(
            lambda: market.cli("tenants", "show", "acme")["held"] == "0", "the slice's return"
        )
        before = market.cli("tenants", "show", "acme")
        market.cli("down")
        assert market.cli("down") == {"state": "was not running"}
        assert market.run("status").returncode == 1
        assert sql_balance(market.home, "acme") == Decimal(before["balance"])
        transfers = market.ledger("transfers")
        paid_in = transfers[transfers["credit_account"] == "tenant:acme"]["amount"].sum()
        paid_out = transfers[transfers["debit_account"] == "tenant:acme"]["amount"].sum()
        assert paid_in - paid_out == Decimal(before["balance"])
        market.cli("up")
        assert market.cli("tenants", "show", "acme") == before
        assert market.cli("deploy", "tiny-qwen")["state"] == "ready"
        market.cli("chat", "tiny-qwen", "What is a list?", "--max-tokens", "3")
        assert market.cli("usage", "--by", "model")[0]["requests"] == 2

    def test_undeploy_drains_and_removes(self, market):
        market.cli("undeploy", "tiny-qwen")
        assert market.cli("deployments") == []
        done = market.run("chat", "tiny-qwen", "Hello?")
        assert done.returncode == 1
        assert "not served here" in done.stderr


class TestTwoReplicas:
    def test_one_killed_is_an_interruption_for_its_own_streams_only(self, market):
        market.cli("deploy", "tiny-qwen", "--replicas", "2")
        tenant = market.tenant()
        asked = {
            "model": "tiny-qwen",
            "messages": [{"role": "user", "content": "What is a list?"}],
            "extra_body": {"ignore_eos": True},
        }
        replicas = market.processes("ServeReplica:model-tiny-qwen")
        assert len(replicas) == 2
        replicas[0].kill()
        for _ in range(10):  # asked at once: nobody has noticed yet, the retry goes elsewhere
            tenant.client().chat.completions.create(**asked, max_tokens=3)
        rows = tenant.rows(10)
        assert set(rows["finish_reason"]) == {"length"}
        assert Decimal(tenant.balance()["balance"]) == 10 - rows["charge"].sum()
        wait_until(
            lambda: len(market.processes("ServeReplica:model-tiny-qwen")) == 2 or None,
            "the second replica's return",
        )
        market.cli("undeploy", "tiny-qwen")


def test_model_whose_weights_cannot_be_had_fails_with_a_reason(market):
    done = market.run("deploy", "smollm2-135m")
    assert done.returncode == 1
    assert "smollm2-135m did not start" in done.stderr
    assert "could not get smollm2-135m from HuggingFaceTB" in done.stderr
    (deployment,) = market.cli("deployments")
    assert deployment["state"] == "failed"
    market.cli("undeploy", "smollm2-135m")


def test_help_needs_no_market_and_no_heavy_import():
    code = "import sys, market.cli.main as m; print([n for n in sys.modules if n in HEAVY])"
    heavy = "HEAVY={'ray','torch','transformers','pandas','pyarrow','sqlalchemy','httpx','rich'}\n"
    done = subprocess.run([sys.executable, "-c", heavy + code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_address_that_is_taken_is_named(tmp_path, tiny_model, monkeypatch):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    server = HTTPServer(("127.0.0.1", free_port()), BaseHTTPRequestHandler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        from tests.e2e.conftest import Market

        market = Market(tmp_path, tiny_model)
        market.url = f"http://127.0.0.1:{server.server_port}"
        done = market.run("up")
        assert done.returncode == 1
        assert "something else answers" in done.stderr
        assert not (tmp_path / "state" / "cluster.json").exists()
    finally:
        server.shutdown()
        server.server_close()


def test_two_markets_run_side_by_side(market, tmp_path, tiny_model):
    with running_market(tmp_path, tiny_model) as other:
        other.cli("tenants", "create", "somebody")
        assert "somebody" not in [t["tenant_id"] for t in market.cli("tenants", "ls")]
        assert json.loads(other.run("tenants", "ls", "-o", "json").stdout)[0]["balance"] == "0"
