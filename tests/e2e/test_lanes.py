"""Hybrid and auto deployments: the client stays the same, the lane changes; money is exact."""

import asyncio
from decimal import Decimal

import pytest

from tests.e2e.conftest import running_market, wait_until

pytestmark = pytest.mark.timeout(400)

MODEL, CHEAP = "tiny-qwen", "smollm2-135m"
BUDGET = Decimal("0.0004")
# On a lease of two places half of these would wait.
LONG = {"max_tokens": 100, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def market(tmp_path_factory, tiny_model):
    """Pools of two models (both with the tiny one's files) and a hybrid of tenant acme."""
    home = tmp_path_factory.mktemp("lanes") / "operator"
    with running_market(home, tiny_model, MARKET_SEQUENCES="2") as market:
        gpu = ("--gpus", "1", "--gpu-memory-gib", "6", "--ask", "2")
        node = market.join("one", "farm", *gpu)
        for folder in (home, node.home):
            (folder / "models" / CHEAP).symlink_to(tiny_model)
        market.acme = market.tenant()
        for model in (MODEL, CHEAP):
            market.cli("deploy", model, "--engine", "transformers", "--no-wait")
        hybrid = ("--mode", "hybrid", "--gpus", "0.18", "--term", "1h", "--tenant")
        limits = ("--spill-budget", f"{BUDGET}", "--ttft", "0.2")
        market.hybrid = market.cli("deploy", MODEL, *hybrid, market.acme.name, *limits)
        wait_until(lambda: all(d["state"] == "ready" for d in market.get("/deployments")), "pools")
        try:
            yield market
        finally:
            node.run("leave", "--force")


async def ask(client, model=MODEL, text="What is a list?", **more):
    """(headers, body) of an answer."""
    messages = [{"role": "user", "content": text}]
    answer = await client.chat.completions.with_raw_response.create(
        model=model, messages=messages, **(LONG | more)
    )
    return answer.headers, answer.parse()


def asked(tenant, count, **more):
    async def all_of_them():
        async with tenant.async_client() as client:
            return await asyncio.gather(*(ask(client, **more) for _ in range(count)))

    return asyncio.run(all_of_them())


def test_hybrid_spills_while_its_lease_is_full_within_the_days_budget(market):
    acme = market.acme
    assert market.hybrid["policy"]["spill_budget"] == "0.0004"
    alone = asked(acme, 1)
    burst = asked(acme, 24)
    again = asked(acme, 1)
    lanes = [headers["x-market-lane"] for headers, _ in burst]
    assert {headers["x-market-lane"] for headers, _ in alone + again} == {"lease"}
    assert set(lanes) == {"lease", "spill"}
    spilled = [headers for headers, _ in burst if headers["x-market-lane"] == "spill"]
    assert {headers["x-market-lane-reason"] for headers in spilled} <= {"ttft", "queue"}
    assert all("x-market-lease-id" not in headers for headers in spilled)
    assert {body.usage.completion_tokens for _, body in burst} == {100}
    rows = acme.rows(26, kind="tokens")
    by_lane = rows.groupby("lane")["charge"].sum()
    assert by_lane["lease"] == 0
    # One answer costs a tenth of the budget: it was used up, and not overdrawn.
    assert BUDGET * Decimal("0.8") < by_lane["spill"] <= BUDGET
    spills = rows[rows["lane"] == "spill"]
    lease_id = market.hybrid["lease"]["lease_id"]
    assert {dict(attrs)["spilled_from"] for attrs in spills["attrs"]} == {lease_id}
    assert len(spills) == len(spilled)


def test_auto_deals_easy_and_hard_requests_and_says_what_it_saved(market):
    tenant = market.tenant()
    auto = ("--mode", "auto", "--cheap", CHEAP, "--strong", MODEL, "--cost-target", "0.3")
    made = market.cli("deploy", "smart", *auto, "--tenant", tenant.name)
    assert made["state"] == "ready"
    assert asked(tenant, 1, model="smart:cheap")[0][1].model == CHEAP  # known at once
    names = [model.id for model in tenant.client().models.list().data]
    assert "smart" in names
    hard = (
        "John has 3 apples, gives 2 to Mary and buys 5 more for $4 each. Tom had 40 dollars and "
        "paid 15% tax on 7 items. How many dollars does he have left after 3 weeks if he earns $12 "
        "per day?"
    )
    easy = asked(tenant, 1, model="smart", text="Which of these is a fruit?")[0]
    forced = asked(tenant, 1, model="smart:strong")[0]
    proof = asked(tenant, 1, model="smart", text=hard)[0]
    assert (easy[0]["x-market-lane-reason"], easy[1].model) == ("simple", CHEAP)
    assert (forced[0]["x-market-lane-reason"], forced[1].model) == ("pinned", MODEL)
    assert (proof[0]["x-market-lane-reason"], proof[1].model) == ("complex", MODEL)
    rows = tenant.rows(4).sort_values("lsn")
    first = rows[rows["model"] == CHEAP].iloc[1]
    attrs = dict(first["attrs"])
    assert (attrs["auto"], attrs["not_taken"]) == ("smart", MODEL)
    counts = first["input_tokens"], first["cached_input_tokens"], first["output_tokens"]
    fresh, cached, output = counts[0] - counts[1], counts[1], counts[2]
    dear = (fresh * Decimal("0.1") + cached * Decimal("0.05") + output * Decimal("0.4")) / 10**6
    assert Decimal(attrs["not_taken_charge"]) == dear
    (lane,) = market.cli("usage", "--by", "lane", "--tenant", tenant.name)
    cheap = rows[rows["model"] == CHEAP]
    saved = (
        sum(Decimal(dict(a)["not_taken_charge"]) for a in cheap["attrs"]) - cheap["charge"].sum()
    )
    assert Decimal(str(lane["saved"])) == saved > 0
    assert Decimal(tenant.balance()["balance"]) == 10 - rows["charge"].sum()
    assert market.cli("undeploy", "smart", "--yes")["state"] == "removed"


def test_wrong_options_say_what_to_do_and_change_nothing(market):
    before = market.cli("deployments")
    tenant = market.tenant()
    auto = ("deploy", CHEAP, "--mode", "auto", "--cheap", CHEAP, "--strong", MODEL)
    refused = market.run(*auto, "--tenant", tenant.name)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "name of your own" in refused.stderr
    wrong = market.run("deploy", MODEL, "--mode", "lease", "--cheap", CHEAP)
    assert wrong.returncode == 2
    assert [d["deployment_id"] for d in market.cli("deployments")] == [
        d["deployment_id"] for d in before
    ]
