"""kill -9 of each process while requests run: nothing lost, nothing doubled, nobody overcharged."""

import asyncio
import contextlib
import signal
from decimal import Decimal

import openai
import psutil
import pytest

from tests.e2e.conftest import wait_until

pytestmark = pytest.mark.timeout(500)

HI = [{"role": "user", "content": "What is a list?"}]
REPLICA = "ServeReplica:model-tiny-qwen"
GATEWAY = "ServeReplica:gateway"


def asked(max_tokens, **more):
    return {
        "model": "tiny-qwen",
        "messages": HI,
        "max_tokens": max_tokens,
        "extra_body": {"ignore_eos": True},
        **more,
    }


def only(processes):
    (process,) = processes
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    psutil.wait_procs([process], timeout=20)


def serving_again(market):
    def answers():
        tenant = market.tenant()
        try:
            tenant.client(timeout=20).chat.completions.create(**asked(1))
        except openai.APIError:
            return None
        return True

    wait_until(answers, "service after the kill", timeout_s=240)


async def stream_one(client, max_tokens, chunk_came):
    """(tokens by usage, cost) of one streamed answer."""
    stream = await client.chat.completions.create(
        **asked(max_tokens), stream=True, stream_options={"include_usage": True}
    )
    usage = None
    async for chunk in stream:
        chunk_came()
        usage = chunk.usage or usage
    assert usage is not None, "the stream ended without its usage"
    return usage.completion_tokens, Decimal(usage.cost)


async def test_ledger_killed_in_the_middle_of_fifty_streams(vllm_market):
    """Each response is complete, recorded once, and charged exactly."""
    tenant = vllm_market.tenant()
    pid = vllm_market.status()["ledger"]["pid"]
    lengths = [60 + n * 10 for n in range(50)]
    chunks, done, done_at_kill = 0, 0, None

    def chunk_came():
        nonlocal chunks
        chunks += 1

    async def stream(client, length):
        nonlocal done
        answer = await stream_one(client, length, chunk_came)
        done += 1
        return answer

    async def killer():
        nonlocal done_at_kill
        while chunks < 60:
            await asyncio.sleep(0)
        psutil.Process(pid).kill()
        done_at_kill = done

    async with tenant.async_client() as client:
        killing = asyncio.create_task(killer())
        answers = await asyncio.gather(*(stream(client, length) for length in lengths))
        await killing
    assert done_at_kill < 50, "the kill came too late to be in the middle"
    assert [tokens for tokens, _ in answers] == lengths
    rows = tenant.rows(50)
    assert rows["request_id"].is_unique
    assert sorted(rows["output_tokens"]) == lengths
    charged = sum(cost for _, cost in answers)
    assert rows["charge"].sum() == charged
    assert tenant.settled() == 10 - charged
    status = vllm_market.status()
    assert status["ledger"]["pid"] != pid
    everything = vllm_market.ledger()
    assert len(everything) == everything["lsn"].max() - everything["lsn"].min() + 1
    assert not everything.duplicated(["producer", "epoch", "seq"]).any()


def test_replica_killed_after_the_first_token_is_an_error_and_free(vllm_market):
    for _ in range(5):
        tenant = vllm_market.tenant()
        replica = only(vllm_market.processes(REPLICA))
        engine = replica.children(recursive=True)
        stream = tenant.client().chat.completions.create(**asked(1900), stream=True)
        next(iter(stream))
        kill(replica)
        chunks, caught = [], None
        try:
            chunks.extend(stream)
        except openai.APIError as error:
            caught = error
        (row,) = tenant.rows(1).to_dict("records")
        if row["finish_reason"] != "length":  # on a busy machine the answer may end before
            break
        serving_again(vllm_market)
    assert "replica" in str(caught), f"{chunks[-1:]}, recorded: {row}"
    assert (row["finish_reason"], row["charge"]) == ("provider_error", 0)
    assert tenant.balance()["balance"] == "10"
    _, alive = psutil.wait_procs(engine, timeout=60)
    assert not alive, "the engine outlived its replica"
    serving_again(vllm_market)


def test_replica_killed_before_the_first_token_is_retried_and_billed_once(vllm_market):
    tenant = vllm_market.tenant()
    replica = only(vllm_market.processes(REPLICA))
    engine = replica.children(recursive=True)
    for process in engine:
        process.suspend()

    async def ask_and_kill():
        async with tenant.async_client() as client:
            asking = asyncio.create_task(client.chat.completions.create(**asked(7)))
            while tenant.balance()["held"] == "0":
                await asyncio.sleep(0.05)
            await asyncio.sleep(0)
            kill(replica)
            for process in engine:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            return await asking

    answer = asyncio.run(ask_and_kill())
    assert answer.usage.completion_tokens == 7
    (row,) = tenant.rows(1).to_dict("records")
    assert (row["finish_reason"], row["output_tokens"]) == ("length", 7)
    assert Decimal(tenant.balance()["balance"]) == 10 - row["charge"]


def test_gateway_killed_in_a_stream_leaves_a_recovered_row_and_no_hold(vllm_market):
    for _ in range(5):
        tenant = vllm_market.tenant()
        gateway = only(vllm_market.processes(GATEWAY))
        stream = tenant.client().chat.completions.create(**asked(1900), stream=True)
        next(iter(stream))
        kill(gateway)
        with contextlib.suppress(openai.APIError, Exception):
            for _ in stream:
                pass
        serving_again(vllm_market)
        (row,) = tenant.rows(1).to_dict("records")
        if row["finish_reason"] != "length":  # on a busy machine the answer may end before
            break
    assert (row["usage_quality"], row["finish_reason"]) == ("recovered", "market_fault")
    assert row["charge"] == 0
    assert tenant.settled() == 10


def test_gateway_killed_with_a_record_in_its_spool_bills_it_when_it_is_back(vllm_market):
    """The answer was complete, but the ledger did not have its record yet."""
    tenant = vllm_market.tenant()
    gateway = only(vllm_market.processes(GATEWAY))
    ledger = psutil.Process(vllm_market.status()["ledger"]["pid"])
    stream = tenant.client().chat.completions.create(**asked(300), stream=True)
    chunks = iter(stream)
    next(chunks)
    ledger.suspend()
    try:
        for _ in chunks:
            pass
        kill(gateway)
    finally:
        ledger.resume()
    serving_again(vllm_market)
    (row,) = tenant.rows(1).to_dict("records")
    assert (row["usage_quality"], row["output_tokens"]) == ("engine", 300)
    assert Decimal(tenant.balance()["balance"]) == 10 - row["charge"]


def test_ledger_killed_when_idle_publishes_what_it_had_booked(vllm_market):
    """Nobody calls it: it has to come back by itself."""
    tenant = vllm_market.tenant()
    pid = vllm_market.status()["ledger"]["pid"]
    tenant.client().chat.completions.create(**asked(3))
    kill(psutil.Process(pid))
    assert list(tenant.rows(1)["output_tokens"]) == [3]


def test_scheduler_killed_does_not_stop_service(vllm_market):
    tenant = vllm_market.tenant()
    pid = vllm_market.status()["scheduler"]["pid"]
    kill(psutil.Process(pid))
    tenant.client().chat.completions.create(**asked(5))
    wait_until(lambda: vllm_market.status()["scheduler"]["pid"] != pid, "a new scheduler")
    assert [d["state"] for d in vllm_market.cli("deployments")] == ["ready"]
