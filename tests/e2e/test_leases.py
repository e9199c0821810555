"""Leases on a real cluster of three nodes with logical GPUs: one story, told in order.

Node ``one`` has one GPU, node ``two`` another; the operator's node has none.
"""

import contextlib
import json
import time
from datetime import datetime
from decimal import Decimal

import openai
import psutil
import pytest

from tests.e2e.conftest import running_market, wait_until

pytestmark = pytest.mark.timeout(400)

ASK = {"model": "tiny-qwen", "messages": [{"role": "user", "content": "What is a list?"}]}
HOUR_US = 3_600 * 10**6
PATIENCE_S = 3


@pytest.fixture(scope="module")
def market(tmp_path_factory, tiny_model):
    home = tmp_path_factory.mktemp("lease-market") / "operator"
    with running_market(home, tiny_model, MARKET_NODE_PATIENCE_S=str(PATIENCE_S)) as market:
        market.nodes = {
            "one": market.join("one", "provider-1", "--ask", "2.10", "--gpus", "1"),
            "two": market.join("two", "provider-2", "--ask", "2.123456789012", "--gpus", "1"),
        }
        market.acme, market.other = market.tenant(), market.tenant()
        market.leases = {}
        try:
            yield market
        finally:
            for node in market.nodes.values():
                node.run("leave", "--force")


def order(market, tenant, *options):
    done = market.run(
        "deploy", "tiny-qwen", "--mode", "lease", "--output", "json", *options, key=tenant.key
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["lease"]["lease_id"]


def state(market, name):
    lease = market.lease(market.leases[name])
    return lease["state"], lease["close_reason"]


def test_quote_says_place_and_price_and_grants_nothing(market):
    done = market.run(
        *("deploy", "tiny-qwen", "--mode", "lease", "--gpus", "0.5", "--term", "10m"),
        *("--dry-run", "--output", "json"),
        key=market.acme.key,
    )
    quote = json.loads(done.stdout)
    assert (quote["fits"], quote["node_id"]) == (True, "one")  # the cheaper one
    assert (quote["price_per_hour"], quote["total"], quote["held"]) == ("1.05", "0.175", "0.175")
    assert market.get("/leases") == []
    assert market.acme.balance()["held"] == "0"


def test_two_halves_share_one_gpu(market):
    half = ("--gpus", "0.5", "--provider", "provider-1")
    began = time.monotonic()
    market.leases["a"] = order(market, market.acme, *half, "--term", "20m")
    answer = market.acme.client().chat.completions.create(**ASK, max_tokens=5)
    print(f"lease to first answer: {time.monotonic() - began:.1f} s")
    assert answer.usage.model_extra["cost"] == "0"
    market.leases["b"] = order(market, market.other, *half, "--term", "80s")
    places = {
        (place["node_id"], tuple(place["gpu_indices"]), place["gpu_milli"])
        for deployment in market.get("/deployments")
        for place in deployment["places"]
    }
    assert places == {("one", (0,), 500)}
    assert state(market, "a") == state(market, "b") == ("active", None)


def test_third_half_is_refused_with_a_reason(market):
    done = market.run(
        *("deploy", "tiny-qwen", "--mode", "lease", "--gpus", "0.5", "--term", "20m"),
        *("--provider", "provider-1"),
        key=market.other.key,
    )
    assert done.returncode == 1
    assert "at most 0 of a GPU free for the whole term" in done.stderr
    assert "it would fit from" in done.stderr
    (refused,) = market.get("/orders")
    assert "another provider than provider-1" in refused["reason"]


def test_lease_is_its_holders_alone(market):
    stranger = market.tenant()
    with pytest.raises(openai.NotFoundError):
        stranger.client().chat.completions.create(**ASK, max_tokens=5)
    assert [m.id for m in market.acme.client().models.list()] == ["tiny-qwen"]
    assert list(stranger.client().models.list()) == []
    for arguments in (("leases", "show"), ("leases", "release", "--yes")):
        done = market.run(*arguments, market.leases["a"], key=stranger.key)
        assert done.returncode == 1
        assert "no lease" in done.stderr


def test_renewal_moves_the_end(market):
    before = market.lease(market.leases["a"])["end"]
    done = market.run("leases", "renew", market.leases["a"], "--term", "10m", key=market.acme.key)
    assert done.returncode == 0, done.stderr
    after = market.lease(market.leases["a"])["end"]
    longer = datetime.fromisoformat(after) - datetime.fromisoformat(before)
    assert longer.total_seconds() == 600


def test_status_draws_the_gpus(market):
    shown = market.cli_plain("status")
    assert "one" in shown
    assert "logical" in shown
    assert "0.5" in shown


def test_scheduler_and_controller_killed_disturb_no_answer(market):
    pid = market.status()["scheduler"]["pid"]
    stream = market.acme.client().chat.completions.create(
        **ASK, max_tokens=600, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks)
    began = time.monotonic()
    psutil.Process(pid).kill()
    (controller,) = market.processes("ServeController")
    controller.kill()

    def back():
        market.acme.client().chat.completions.create(**ASK, max_tokens=5)
        return market.status()["scheduler"]["pid"] != pid

    wait_until(back, "a new scheduler", 90)
    print(f"scheduler and controller back after {time.monotonic() - began:.1f} s")
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "length"
    market.acme.client().chat.completions.create(**ASK, max_tokens=5)
    assert state(market, "a") == ("active", None)


def test_lease_drains_and_expires(market):
    lease = market.lease(market.leases["b"])

    def refused():
        try:
            market.other.client().chat.completions.create(**ASK, max_tokens=1)
        except openai.InternalServerError as error:
            return error.status_code == 503 and "drains" in str(error)
        except openai.NotFoundError:
            return True  # over already
        return False

    wait_until(refused, "the drain", timeout_s=100)
    wait_until(lambda: state(market, "b") == ("closed", "expired"), "the end", timeout_s=40)
    wait_until(lambda: market.other.balance()["held"] == "0", "the hold's end")
    over = market.lease(market.leases["b"])
    assert over["end"] == lease["end"]
    wait_until(lambda: len(market.get("/deployments")) == 1, "the GPU's freeing", timeout_s=60)
    assert state(market, "a") == ("active", None)


def test_node_killed_moves_one_lease_and_closes_another_with_credit(market):
    more = ("--gpus", "0.5", "--term", "20m")
    market.leases["c"] = order(market, market.other, *more, "--max-price", "3")
    market.leases["d"] = order(market, market.other, *more, "--provider", "provider-2")
    lease_c = market.lease(market.leases["c"])
    assert lease_c["node_id"] == "one"  # the cheaper one has room again
    node = market.nodes["two"]
    for name in ("supervisor.json", "worker.json"):  # first who would bring it back
        process = psutil.Process(json.loads((node.home / "state" / name).read_text())["pid"])
        family = process.children(recursive=True)
        process.kill()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    wait_until(lambda: market.offer("two")["state"] == "lost", "the loss", timeout_s=60)
    wait_until(lambda: state(market, "d") == ("closed", "node_lost"), "its end", timeout_s=60)
    over = market.lease(market.leases["d"])
    assert over["credited_s"] > 0
    assert state(market, "c")[0] == "active"
    done = market.run("deploy", "tiny-qwen", "--mode", "lease", "--provider", "provider-2",
                      key=market.other.key)  # fmt: skip
    assert "is lost" in done.stderr


def test_everything_stopped_and_started_comes_back_on_its_gpu(market):
    before = market.lease(market.leases["a"])
    market.cli("down")
    market.cli("up")
    wait_until(lambda: market.offer("one")["state"] == "open", "the node's return", timeout_s=120)

    def answers():
        with contextlib.suppress(openai.APIError):
            market.acme.client().chat.completions.create(**ASK, max_tokens=1)
            return True

    wait_until(answers, "the lease's return", timeout_s=120)
    after = market.lease(market.leases["a"])
    assert (after["node_id"], after["gpu_indices"]) == (before["node_id"], before["gpu_indices"])
    assert after["credited_s"] > before["credited_s"]


def test_charges_are_healthy_gpu_time_at_the_price_exactly(market):
    for name in ("a", "c"):
        done = market.run("leases", "release", market.leases[name], "--yes")
        assert done.returncode == 0, done.stderr
    for tenant in (market.acme, market.other):
        wait_until(lambda tenant=tenant: tenant.balance()["held"] == "0", "the holds' end")
    leases = {name: market.lease(lease_id) for name, lease_id in market.leases.items()}
    total = sum(Decimal(lease["charged"]) for lease in leases.values())
    market.cli("ledger", "compact")  # publishes what is booked
    rows = market.ledger()
    rows = rows[rows["kind"] == "gpu"]
    assert rows["charge"].sum() == total
    for lease in leases.values():
        own = rows[rows["lease_id"] == lease["lease_id"]].sort_values("started_at")
        gpu_us = int(own["gpu_us"].sum())
        pico = int(Decimal(lease["price_per_gpu_hour"]) * 10**12)
        assert own["charge"].sum() == Decimal(gpu_us * pico // HOUR_US).scaleb(-12)
        assert Decimal(lease["charged"]) == own["charge"].sum()
        assert (own["finished_at"].iloc[:-1].values == own["started_at"].iloc[1:].values).all()
        paid = own[own["gpu_us"] > 0]  # none, if it died soon
        assert ((paid["finished_at"] - paid["started_at"]).dt.total_seconds() <= 60.000001).all()
        start, end = map(datetime.fromisoformat, (lease["start"], lease["end"]))
        assert own["started_at"].iloc[0] == start
        assert own["finished_at"].iloc[-1] == end
        length_s = (end - start).total_seconds()
        assert lease["healthy_s"] + lease["credited_s"] == pytest.approx(length_s, abs=1e-5)
    left = {t.name: Decimal(t.balance()["balance"]) for t in (market.acme, market.other)}
    assert sum(left.values()) == 20 - total
    assert market.cli("ledger", "verify")["finding"] is None
