"""Two gateways of one market: one budget, one store of answers; one dies, the other serves on."""

import asyncio
import json
import signal
from decimal import Decimal

import openai
import psutil
import pytest

from tests.e2e.conftest import running_market, wait_until

pytestmark = pytest.mark.timeout(400)

HI = [{"role": "user", "content": "What is a list?"}]


@pytest.fixture(scope="module")
def market(tmp_path_factory, tiny_model):
    home = tmp_path_factory.mktemp("two-gateways")
    with running_market(home, tiny_model, MARKET_GATEWAYS="2") as market:
        market.cli("deploy", "tiny-qwen", "--mode", "tokens", "--engine", "transformers")
        yield market


def asked(max_tokens, **more):
    body = {"model": "tiny-qwen", "messages": HI, "max_tokens": max_tokens, "temperature": 0}
    return body | {"extra_body": {"ignore_eos": True}} | more


def gateways_of(market, tenant):
    """The gateways that this tenant's requests came to."""
    found = set()
    for log in (market.home / "logs").glob("access-*.jsonl"):
        lines = map(json.loads, log.read_text().splitlines())
        if any(line.get("subject") == tenant.name for line in lines):
            found.add(log.stem)
    return found


async def fresh(tenant, **asking):
    """Ask over a connection of its own, which the kernel deals to either gateway."""
    async with tenant.async_client() as client:
        return await client.chat.completions.create(**asking)


async def test_money_is_short_for_both_together(market):
    """Each answer is whole, cut, or refused; what was served is charged, exactly."""
    length = 40
    deposit = Decimal("0.0000004") * length * 20
    tenant = market.tenant(str(deposit))

    async def one():
        try:
            answer = await fresh(tenant, **asked(length))
        except openai.APIStatusError as error:
            if error.status_code != 402:
                raise
            return None
        assert answer.choices[0].finish_reason == "length"
        return Decimal(answer.usage.cost)

    costs = await asyncio.gather(*(one() for _ in range(80)))
    served = [cost for cost in costs if cost is not None]
    assert len(gateways_of(market, tenant)) == 2
    assert served
    assert len(served) < len(costs)
    assert tenant.settled() == deposit - sum(served)
    assert tenant.balance()["balance"][0] != "-"


async def test_a_stored_answer_comes_through_either(market):
    tenant = market.tenant()
    keyed = asked(5, extra_headers={"Idempotency-Key": "order-1"})
    first = await fresh(tenant, **keyed)
    for _ in range(40):
        assert (await fresh(tenant, **keyed)).id == first.id
        if len(gateways_of(market, tenant)) == 2:
            break
    assert len(gateways_of(market, tenant)) == 2
    assert tenant.settled() == 10 - tenant.rows(1)["charge"].sum()


async def load_while(tenant, trouble, count=40, each=4, length=20):
    """Costs of the answers that came whole while ``trouble`` happened, and how many failed.

    They have ``length`` tokens at least.
    """
    costs, failed = [], 0

    async def client(number):
        nonlocal failed
        for n in range(each):
            while True:
                try:
                    answer = await fresh(tenant, **asked(length + (7 * number + n) % 40))
                    break
                except openai.APIError:
                    failed += 1
                    await asyncio.sleep(0.1)
            costs.append(Decimal(answer.usage.cost))

    clients = [asyncio.create_task(client(n)) for n in range(count)]
    while len(costs) < count // 2:
        await asyncio.sleep(0.01)
    trouble()
    assert len(costs) < count * each, "the trouble came too late to be in the middle"
    await asyncio.gather(*clients)
    return costs, failed


def kill(process):
    process.send_signal(signal.SIGKILL)
    psutil.wait_procs([process], timeout=20)


async def test_one_killed_under_load(market):
    tenant = market.tenant()
    victim = market.processes("ServeReplica:gateway")[0]
    # Long ones: this process makes a client for each, so that few short ones would be under way.
    costs, failed = await load_while(tenant, lambda: kill(victim), length=400)
    assert failed, "nobody was connected to the gateway that died"
    left = tenant.settled()  # so its slices returned
    spent = 10 - left

    def booked():
        ledger = market.ledger()
        mine = ledger[ledger["tenant_id"] == tenant.name]
        return mine if mine["charge"].sum() == spent else None

    rows = wait_until(booked, f"rows that sum to {spent}")
    # Beside the answers that came: rows of those that did not. They are free, unless all of an
    # answer was made and recorded, and only its way to the client was cut.
    assert rows["request_id"].is_unique
    assert spent >= sum(costs)
    wait_until(lambda: len(market.processes("ServeReplica:gateway")) == 2, "another gateway")


@pytest.mark.parametrize("service", ["ledger", "scheduler"])
async def test_service_goes_on_while_one_restarts(market, service):
    tenant = market.tenant()
    pid = market.status()[service]["pid"]
    costs, failed = await load_while(tenant, lambda: kill(psutil.Process(pid)))
    assert failed == 0
    assert tenant.settled() == 10 - sum(costs)
    assert tenant.rows(len(costs))["charge"].sum() == sum(costs)
    wait_until(lambda: market.status()[service]["pid"] != pid, f"a new {service}")
