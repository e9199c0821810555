"""A model that costs nothing while nobody asks: it sleeps, is woken by requests, billed exactly."""

import asyncio
from decimal import Decimal

import httpx
import pytest

from tests.e2e.conftest import running_market, wait_until

pytestmark = pytest.mark.timeout(400)

MODEL = "tiny-qwen"
REPLICA = "ServeReplica:model-tiny-qwen"
ASKED = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is a list?"}],
    "max_tokens": 5,
}


@pytest.fixture(scope="module")
def market(tmp_path_factory, tiny_model):
    with running_market(tmp_path_factory.mktemp("elastic"), tiny_model) as market:
        yield market


@pytest.fixture
def cold(market):
    """The model deployed, and nothing of it running."""
    market.cli("deploy", MODEL, "--replicas", "0:2", "--keep-alive", "4s")
    wait_until(lambda: is_cold(market), "the model's sleep", 120)
    return market


def is_cold(market):
    (deployment,) = market.cli("deployments")
    return (deployment["state"] == "cold" and not deployment["places"]) or None


def test_burst_on_a_cold_model_is_served_whole_and_billed_right(cold):
    """Twenty at once, half of them streamed; then it sleeps again, and its processes are gone."""
    assert cold.processes(REPLICA) == []
    tenant = cold.tenant()
    client = tenant.client()
    assert [model.id for model in client.models.list().data] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "market"
    assert cold.processes(REPLICA) == []  # looking does not wake it

    async def burst():
        headers = {"authorization": f"Bearer {tenant.key}"}
        async with httpx.AsyncClient(base_url=cold.url, headers=headers, timeout=300) as http:
            bodies = [ASKED | {"stream": number % 2 == 0} for number in range(20)]
            return await asyncio.gather(
                *(http.post("/v1/chat/completions", json=body) for body in bodies)
            )

    answers = asyncio.run(burst())
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.text.endswith("data: [DONE]\n\n")
            assert "error" not in answer.text
    rows = tenant.rows(20)
    assert set(rows["finish_reason"]) <= {"length", "stop"}
    assert Decimal(tenant.balance()["balance"]) == 10 - rows["charge"].sum()
    assert rows["queue_ms"].max() < 60_000
    metrics = httpx.get(
        f"{cold.url}/metrics", headers={"authorization": f"Bearer {operator_key(cold)}"}
    ).text
    assert 'market_cold_start_seconds_count{model="tiny-qwen"} 20' in metrics
    wait_until(lambda: is_cold(cold), "the model's sleep", 120)
    wait_until(lambda: not cold.processes(REPLICA) or None, "the end of its processes")


def test_stream_is_kept_alive_with_comments_while_the_model_starts(cold):
    """Clients and proxies see that somebody is there."""
    tenant = cold.tenant()
    headers = {"authorization": f"Bearer {tenant.key}"}
    url = f"{cold.url}/v1/chat/completions"
    with httpx.stream(
        "POST", url, json=ASKED | {"stream": True}, headers=headers, timeout=300
    ) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    waited = [line for line in lines if line.startswith(":")]
    assert lines[len(waited)].startswith("data: {")
    assert lines[-1] == "data: [DONE]"
    row = tenant.rows(1).iloc[0]
    assert row["charge"] > 0
    assert waited or row["ttft_ms"] < 10_000


def test_who_cannot_pay_wakes_nothing(cold):
    poor = cold.tenant(deposit="0")
    answer = httpx.post(
        f"{cold.url}/v1/chat/completions",
        json=ASKED,
        headers={"authorization": f"Bearer {poor.key}"},
        timeout=60,
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (402, "insufficient_balance")
    (deployment,) = cold.cli("deployments")
    assert deployment["places"] == []


def test_bounds_are_shown_and_changed_by_deploying_again(cold):
    assert " of 0:2" in cold.cli_plain("deployments")
    again = cold.cli("deploy", MODEL, "--replicas", "1")
    assert again["state"] == "ready"
    assert "1/1" in cold.cli_plain("deployments")


def operator_key(market):
    return (market.home / "operator.key").read_text().strip()


FOUR = ("tiny-qwen", "smollm2-135m", "smollm2-360m", "qwen-0.5b")


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_model):
    """Three nodes: the operator's takes no models, two have one logical GPU of 3 GiB each.

    Four models of the catalog, all with the tiny one's files, of which two GPUs hold not all; and a
    lease.
    """
    home = tmp_path_factory.mktemp("shared-market") / "operator"
    gpu = ("--gpus", "1", "--gpu-memory-gib", "3", "--ask", "2")
    with running_market(home, tiny_model) as market:
        nodes = [market.join(name, f"provider-{name}", *gpu) for name in ("one", "two")]
        for folder in (home, *(node.home for node in nodes)):
            for model in FOUR[1:]:
                (folder / "models" / model).symlink_to(tiny_model)
        market.cli("drain", "local")
        market.acme = market.tenant()
        lease = ("--mode", "lease", "--gpus", "0.36", "--term", "1h", "--tenant", market.acme.name)
        market.lease_id = market.cli("deploy", MODEL, *lease)["lease"]["lease_id"]
        for model in FOUR:
            options = ("--engine", "transformers", "--replicas", "0:1", "--keep-alive", "1h")
            market.cli("deploy", model, *options)
        try:
            yield market
        finally:
            for node in nodes:
                node.run("leave", "--force")


def test_four_models_share_two_gpus_and_leave_the_lease_alone(shared):
    """Asked in turn, then all at once: whoever is idle makes room."""
    tenant, seen, before = shared.tenant(), [], lease_places(shared)
    headers = {"authorization": f"Bearer {tenant.key}"}

    async def ask(http, model):
        answer = await http.post("/v1/chat/completions", json=ASKED | {"model": model})
        assert answer.status_code == 200, answer.text
        seen.append(shares(shared))

    async def ask_all():
        async with httpx.AsyncClient(base_url=shared.url, headers=headers, timeout=300) as http:
            for model in FOUR:
                await ask(http, model)
            await asyncio.gather(*(ask(http, model) for model in FOUR))

    asyncio.run(ask_all())
    assert max(milli for used in seen for milli in used.values()) <= 1000
    rows = tenant.rows(8)
    assert dict.fromkeys(FOUR, 2) == rows["model"].value_counts().to_dict()
    assert set(rows["node_id"]) == {"one", "two"}
    assert Decimal(tenant.balance()["balance"]) == 10 - rows["charge"].sum()
    lease = shared.lease(shared.lease_id)
    assert (lease["state"], lease_places(shared)) == ("active", before)
    answer = httpx.post(
        f"{shared.url}/v1/chat/completions",
        json=ASKED,
        headers={"authorization": f"Bearer {shared.acme.key}"},
        timeout=60,
    )
    assert answer.headers["x-market-lane"] == "lease"


def lease_places(market):
    """The lease's replicas: another one would have another id."""
    (own,) = (d for d in market.get("/deployments") if d["lease_id"] is not None)
    return [place["replica_id"] for place in own["places"]]


def shares(market):
    """Milli in use of each GPU."""
    return {
        (offer["offer_id"], gpu["index"]): sum(used["milli"] for used in gpu["used"])
        for offer in market.get("/offers")
        for gpu in offer["gpus"]
    }
