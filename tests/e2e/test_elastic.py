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
