"""The HTTP surface over fakes: no Ray, no engine, every byte of the answer."""

import asyncio
import json

import httpx
import pytest

from market.config import Config
from market.fakes import DirectSink, FakeClock, FakeEngine, FakeRoutes, MemoryLedger
from market.inference import Inference
from market.keys import hash_key, key_id, new_key
from market.types import FinishReason, Principal, Role
from serve_apps.auth import Authenticator
from serve_apps.http import Services, create_app
from serve_apps.metrics import Metrics
from tests.samples import ACME, CARD, ROUTE, deposit

KEYS = {"sk-acme": ACME, "sk-op": Principal("key-op", Role.OPERATOR, "operator")}
AUTH = {"authorization": "Bearer sk-acme"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


class FakeKeys:
    def __init__(self):
        self.lookups = 0

    async def find_key(self, key_hash):
        self.lookups += 1
        return {hash_key(key): principal for key, principal in KEYS.items()}.get(key_hash)


class FakePrompter:
    vocabulary = 100

    async def chat(self, body):
        return tuple(range(10))

    async def completion(self, body):
        return tuple(range(10))


class Routes(FakeRoutes):
    def ready(self, principal):
        return [ROUTE]

    async def prompter(self, route):
        return FakePrompter()


class Gateway:
    def __init__(self, engine):
        self.engine = engine

    async def start(self):
        self.ledger = MemoryLedger(FakeClock())
        await self.ledger.create_tenant("acme")
        await self.ledger.create_provider("local")
        await self.ledger.add_rate_cards([CARD], only_new_models=False)
        await self.ledger.transfer(deposit("1"))
        sink = DirectSink(self.ledger)
        await sink.start()
        routes = Routes(ROUTE, CARD, self.engine)
        self.inference = Inference(FakeClock(), self.ledger, sink, routes)
        self.keys = FakeKeys()
        config = Config.from_env({})
        self.app = create_app(
            Services(
                config=config,
                clock=FakeClock(),
                ledger=self.ledger,
                scheduler=None,
                routes=routes,
                inference=self.inference,
                authenticator=Authenticator(self.keys),
                metrics=Metrics(),
            )
        )
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test", headers=AUTH)
        return self

    async def record(self):
        await self.inference.drain()
        (record,) = self.ledger.records
        assert await self.ledger.open_holds() == []
        return record


async def gateway(**engine):
    return await Gateway(FakeEngine(**engine)).start()


def events(answer):
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


async def test_stream_is_chunks_then_usage_then_done():
    here = await gateway()
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    answer = await here.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(answer)
    assert done == "[DONE]"
    chunks = [json.loads(chunk) for chunk in chunks]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == "0 1 2 "
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 0},
        "cost": "0.0000022",
    }
    assert {c["id"] for c in chunks} == {"chatcmpl-req-gw0-1"}
    assert answer.headers["x-request-id"] == "req-gw0-1"


async def test_done_comes_only_after_the_record_is_committed():
    here = await gateway()
    order = []
    real = here.inference._sink.record

    async def record(usage_record):
        order.append("committing")
        await asyncio.sleep(0)
        committed = await real(usage_record)
        order.append("committed")
        return committed

    here.inference._sink.record = record
    async with here.http.stream(
        "POST", "/v1/chat/completions", json=CHAT | {"stream": True}
    ) as answer:
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                order.append("done")
    assert order == ["committing", "committed", "done"]


async def test_fault_before_the_first_token_is_an_http_error():
    here = await gateway(fail_at=0)
    answer = await here.http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_failed"
    assert (await here.record()).charge_pico == 0


async def test_fault_inside_the_stream_is_an_error_event_and_no_done():
    here = await gateway(fail_at=2)
    answer = await here.http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    *_, last = events(answer)
    assert json.loads(last)["error"]["code"] == "engine_failed"
    record = await here.record()
    assert (record.finish_reason, record.charge_pico) == (FinishReason.PROVIDER_ERROR, 0)


async def test_bug_is_a_500_without_details():
    here = await gateway()
    here.ledger.open_hold = lambda request: 1 / 0
    answer = await here.http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 500
    assert "ZeroDivision" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


async def hang_up(here, after_events, cancel=False):
    """Speak ASGI by hand: a client that goes away while the answer streams."""
    sent = []
    gone = asyncio.Event()
    body = json.dumps(CHAT | {"stream": True, "max_tokens": 900}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message.get("body"):
            sent.append(message["body"])
            if len(sent) == after_events:
                gone.set()
                if cancel:
                    task.cancel()
                await asyncio.Event().wait()  # a full socket: this send never ends

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer sk-acme")],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    task = asyncio.create_task(here.app(scope, receive, send))
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("cancel", [False, True])
async def test_client_that_hangs_up_aborts_the_engine_and_pays_what_was_generated(cancel):
    here = await gateway()
    await asyncio.wait_for(hang_up(here, after_events=4, cancel=cancel), 5)
    record = await here.record()
    assert record.finish_reason is FinishReason.CLIENT_DISCONNECT
    assert record.output_tokens == 3  # the first event carries the role
    assert here.engine.aborted


class TestKeys:
    async def test_are_looked_up_once_within_two_seconds(self):
        here = await gateway()
        for _ in range(5):
            assert (await here.http.get("/v1/models")).status_code == 200
        assert here.keys.lookups == 1

    @pytest.mark.parametrize(
        "header", [None, "", "Bearer", "Bearer ", "Basic sk-acme", "sk-acme", "Bearer sk-wrong"]
    )
    async def test_anything_else_is_401(self, header):
        here = await gateway()
        headers = {"authorization": header} if header is not None else {}
        del here.http.headers["authorization"]
        answer = await here.http.get("/v1/models", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"

    async def test_wrong_keys_are_not_remembered(self):
        here = await gateway()
        for _ in range(3):
            await here.http.get("/v1/models", headers={"authorization": "Bearer sk-new"})
        KEYS["sk-new"] = ACME
        try:
            answer = await here.http.get("/v1/models", headers={"authorization": "Bearer sk-new"})
        finally:
            del KEYS["sk-new"]
        assert answer.status_code == 200

    def test_are_long_random_and_named_by_their_hash(self):
        first, second = new_key(), new_key()
        assert first != second
        assert len(first) > 45
        assert key_id(first) == key_id(first) != key_id(second)
        assert key_id(first)[4:] not in first


async def test_large_bodies_are_refused():
    here = await gateway()
    answer = await here.http.post("/v1/chat/completions", content=b"x" * (9 * 1024 * 1024))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


async def test_large_bodies_without_a_length_are_refused_before_the_key_is_looked_up():
    here = await gateway()

    async def pieces():
        for _ in range(9):
            yield b" " * 1024 * 1024

    for path in ("/market/v1/tenants", "/v1/completions"):
        answer = await here.http.post(path, content=pieces(), headers={"authorization": ""})
        assert 400 <= answer.status_code < 500
    assert here.keys.lookups == 0


async def test_health_needs_no_key():
    here = await gateway()
    del here.http.headers["authorization"]
    assert (await here.http.get("/healthz")).json()["status"] == "ok"


async def test_openapi_document_lists_our_addresses():
    here = await gateway()
    paths = (await here.http.get("/market/openapi.json")).json()["paths"]
    assert {"/v1/chat/completions", "/market/v1/deployments", "/market/v1/tenants"} <= set(paths)


async def test_unknown_fields_in_our_own_api_are_refused():
    here = await gateway()
    answer = await here.http.post(
        "/market/v1/tenants",
        json={"tenant_id": "x", "balance": "1000000"},
        headers={"authorization": "Bearer sk-op"},
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "balance"
