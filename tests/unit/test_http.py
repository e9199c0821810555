"""The HTTP surface over fakes: no Ray, no engine, every byte of the answer."""

import asyncio
import dataclasses
import json
from datetime import timedelta

import httpx
import pytest

from market.accounts import HoldResult, HoldStatus
from market.answers import DifferentBody
from market.budgets import Allowance
from market.config import Config
from market.errors import Conflict, SlowDown
from market.fakes import FakeClock, FakeEngine, FakeRoutes
from market.keys import hash_key, key_id, new_key
from market.limits import Limits
from market.routing import Choice, Reason
from market.types import (
    Access,
    Budget,
    FinishReason,
    KeyPolicy,
    Lane,
    Period,
    Principal,
    Role,
)
from serve_apps.auth import Authenticator
from serve_apps.http import Services, create_app
from serve_apps.idempotency import Idempotency
from serve_apps.metrics import Metrics
from serve_apps.streams import EventStream
from tests.gateways import Gateway, prepared
from tests.samples import ACME, CARD, ROUTE

KEYS = {"sk-acme": ACME, "sk-op": Principal("key-op", Role.OPERATOR, "operator")}
AUTH = {"authorization": "Bearer sk-acme"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


SPILL = dataclasses.replace(ROUTE, lane=Lane.SPILL)
LEASED = dataclasses.replace(ROUTE, lane=Lane.LEASE, lease_id="lease-1")
CAP = Budget("spill:lease-1", Period.DAY, 10**12)

SCOPE = {
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


class FakeKeys:
    def __init__(self):
        self.lookups = 0
        self.version = 1

    async def find_key(self, key_hash):
        self.lookups += 1
        return {hash_key(key): principal for key, principal in KEYS.items()}.get(key_hash)

    async def access(self):
        return Access(str(self.version), (CARD,))


class FakePrompter:
    vocabulary = 100

    async def chat(self, body, size):
        return tuple(range(10))

    async def text(self, prompt, size, param="prompt"):
        return tuple(range(10))

    def decode(self, token_ids):
        return "p" * len(token_ids)


class Routes(FakeRoutes):
    def ready(self, principal):
        return [ROUTE]

    def waking(self, principal):
        return []

    async def prompter(self, route):
        return FakePrompter()

    def cold(self):
        return {}


class FakeLanes:
    """Sends everything to the one route, or where a test says."""

    def __init__(self, routes):
        self.routes = routes
        self.choice = None
        self.caps = []

    def spent(self, cap):
        self.caps.append(cap)

    def names(self, principal):
        return []

    def models(self, model, principal):
        return (model,)

    def is_starting(self, model):
        return model in self.routes.cold()

    async def choose(self, model, principal, query):
        return self.choice or Choice(await self.routes.route(model, principal))


class Http(Gateway):
    """A gateway with its HTTP surface."""

    async def start(self):
        await super().start()
        self.keys = FakeKeys()
        self.lanes = FakeLanes(self.routes)
        self.config = Config.from_env({})
        self.authenticator = Authenticator(self.keys, self.clock)
        await self.authenticator.poll()
        self.answers = FakeAnswers()
        self.idempotency = Idempotency(self.answers, self.sink.identity)
        await self.watch()
        return self

    async def watch(self, *watchers):
        """Serve with these watchers."""
        self.app = create_app(
            Services(
                config=self.config,
                clock=self.clock,
                ledger=self.ledger,
                scheduler=None,
                routes=self.routes,
                lanes=self.lanes,
                inference=self.inference,
                authenticator=self.authenticator,
                limits=Limits(),
                idempotency=self.idempotency,
                metrics=Metrics(),
                watchers=watchers,
            )
        )
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test", headers=AUTH)

    async def record(self):
        await self.rest()
        (record,) = self.ledger.records
        assert await self.ledger.open_holds() == []
        return record


class FakeAnswers:
    """The store in a dictionary."""

    def __init__(self):
        self.kept = {}

    async def begin(self, tenant_id, key, body_digest, owner, attempt):
        known = self.kept.get((tenant_id, key))
        if known is None:
            self.kept[tenant_id, key] = (body_digest, None)
            return None
        if known[0] != body_digest:
            raise DifferentBody("another body")
        if known[1] is None:
            raise Conflict("running", code="idempotency_key_in_use", retry_after_s=1)
        return known[1]

    async def finish(self, tenant_id, key, owner, answer):
        self.kept[tenant_id, key] = (self.kept[tenant_id, key][0], answer)

    async def drop(self, tenant_id, key, owner):
        del self.kept[tenant_id, key]


async def gateway(balance="1", **engine):
    clock = FakeClock()
    ledger = await prepared(balance, clock)
    return await Http(FakeEngine(**engine), ledger, clock, routes=Routes).start()


def events(answer):
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines), answer.text
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


class TestLanes:
    async def test_says_why_it_went_where_it_went(self):
        here = await gateway()
        here.lanes.choice = Choice(SPILL, Reason.TTFT, cap=CAP, attrs=(("spilled_from", "l-1"),))
        answer = await here.http.post("/v1/chat/completions", json=CHAT)
        assert answer.headers["x-market-lane"] == "spill"
        assert answer.headers["x-market-lane-reason"] == "ttft"
        record = await here.record()
        assert (record.lane, record.charge_pico > 0) == (Lane.SPILL, True)
        assert record.attrs[:2] == (("spilled_from", "l-1"), ("lane_reason", "ttft"))

    @pytest.mark.parametrize(
        ("subject", "status", "code", "caps"),
        [
            (CAP.subject, 503, "model_loading", [CAP]),
            ("key-acme", 402, "budget_exceeded", []),
        ],
    )
    async def test_spent_budget_of_spills_waits_for_the_lease(self, subject, status, code, caps):
        here = await gateway()
        here.lanes.choice = Choice(SPILL, Reason.NOT_READY, cap=CAP)
        bound = Allowance(0, 0, Period.DAY, None, subject)

        async def refuse(_request):
            return HoldResult(HoldStatus.EXCEEDS_BUDGET, None, 0, bound)

        here.ledger.open_hold = refuse
        answer = await here.http.post("/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert ("retry-after" in answer.headers) == (status == 503)
        assert here.lanes.caps == caps
        here.lanes.choice = Choice(SPILL, Reason.TTFT, Choice(LEASED, Reason.OWN), cap=CAP)
        answer = await here.http.post("/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.headers["x-market-lane"]) == (200, "lease")

    async def test_who_cannot_pay_for_the_pool_waits_for_the_lease(self):
        here = await gateway(balance="0")
        here.lanes.choice = Choice(SPILL, Reason.TTFT, Choice(LEASED, Reason.OWN), cap=CAP)
        answer = await here.http.post("/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.headers["x-market-lane"]) == (200, "lease")
        assert (await here.record()).charge_pico == 0

    @pytest.mark.parametrize("stream", [False, True])
    async def test_failure_before_the_first_token_is_served_elsewhere_at_its_price(self, stream):
        here = await gateway(fail_at=0, failures=1)
        here.lanes.choice = Choice(ROUTE, Reason.SIMPLE, Choice(SPILL, Reason.FALLBACK))
        answer = await here.http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
        assert (answer.status_code, answer.headers["x-market-lane-reason"]) == (200, "fallback")
        await here.rest()
        failed, served = here.ledger.records
        assert (failed.charge_pico, failed.finish_reason) == (0, FinishReason.PROVIDER_ERROR)
        assert (served.lane, served.charge_pico > 0) == (Lane.SPILL, True)

    async def test_price_not_taken_is_on_record(self):
        here = await gateway()
        dear = dataclasses.replace(CARD, model="big", price_id="dear", output_pico=10**9)
        here.lanes.choice = Choice(ROUTE, Reason.SIMPLE, not_taken=dear)
        await here.http.post("/v1/chat/completions", json=CHAT)
        attrs = dict((await here.record()).attrs)
        assert (attrs["not_taken"], attrs["not_taken_price_id"]) == ("big", "dear")
        assert attrs["not_taken_charge"] == "0.003001"

    async def test_replica_has_its_second_try_if_elsewhere_costs_too_much(self):
        here = await gateway(balance="0", fail_at=0, failures=1)
        here.lanes.choice = Choice(LEASED, Reason.OWN, Choice(SPILL, Reason.FALLBACK, cap=CAP))
        answer = await here.http.post("/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.headers["x-market-lane"]) == (200, "lease")

    async def test_full_lease_has_the_last_word_before_a_balance_that_is_out(self):
        here = await gateway(balance="0")
        here.lanes.choice = Choice(LEASED, Reason.OWN, Choice(SPILL, Reason.FALLBACK, cap=CAP))

        def full(pool, tenant):
            if pool == "lease-1":
                raise SlowDown("wait", retry_after_s=3)

        here.queues.check = full
        answer = await here.http.post("/v1/chat/completions", json=CHAT)
        assert answer.json()["error"]["code"] == "slow_down"

    async def test_second_try_counts_once_against_the_keys_limits(self):
        here = await gateway(fail_at=0, failures=1)
        limited = KeyPolicy(concurrent=1, requests_per_min=2)
        KEYS["sk-limited"] = dataclasses.replace(ACME, api_key_id="key-limited", policy=limited)
        here.lanes.choice = Choice(ROUTE, Reason.SIMPLE, Choice(SPILL, Reason.FALLBACK))
        headers = {"authorization": "Bearer sk-limited"}
        for _ in range(2):
            answer = await here.http.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert answer.status_code == 200, answer.text
        answer = await here.http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert answer.status_code == 429

    async def test_last_refusal_is_the_answer(self):
        here = await gateway(balance="0")
        here.lanes.choice = Choice(SPILL, Reason.TTFT, Choice(ROUTE, Reason.FALLBACK), cap=CAP)
        answer = await here.http.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 402


class TestPatience:
    """Whoever waits long for a stream is told that somebody is there."""

    @pytest.fixture
    async def slow(self, monkeypatch):
        """A gateway whose model is not there before ``gate`` is open."""
        monkeypatch.setattr("serve_apps.streams.COMMENT_S", 0.01)
        here = await gateway()
        here.gate, here.outcome = asyncio.Event(), None
        route = here.routes.route

        async def wait(model, principal):
            here.asked.set()
            await here.gate.wait()
            if here.outcome is not None:
                raise here.outcome
            return await route(model, principal)

        here.asked, here.routes.route = asyncio.Event(), wait
        here.routes.cold = lambda: {"tiny": 1}
        return here

    async def answered(self, here, stream=True):
        asking = asyncio.create_task(
            here.http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
        )
        await here.asked.wait()
        await asyncio.sleep(0.05)
        here.gate.set()
        return await asyncio.wait_for(asking, 5)

    async def test_comments_come_before_the_chunks(self, slow):
        answer = await self.answered(slow)
        assert answer.text.startswith(": waiting for the model\n\n")
        chunks = answer.text[answer.text.index("data: ") :]
        assert chunks.endswith("data: [DONE]\n\n")
        assert ": waiting" not in chunks
        assert (await slow.record()).output_tokens == 3

    async def test_comments_come_between_the_chunks_of_an_answer_that_stands_still(
        self, slow, monkeypatch
    ):
        slow.gate.set()
        go_on, comment = asyncio.Event(), EventStream._comment

        async def noted(stream, send):
            async def noting(message):
                await send(message)
                go_on.set()

            await comment(stream, noting)

        monkeypatch.setattr(EventStream, "_comment", noted)
        answer = slow.engine.generate

        async def falter(request, *rest):
            async for chunk in answer(request, *rest):
                yield chunk
                await go_on.wait()

        slow.engine.generate = falter
        asking = asyncio.create_task(
            slow.http.post("/v1/chat/completions", json=CHAT | {"stream": True})
        )
        pieces = (await asyncio.wait_for(asking, 10)).text.split("\n\n")
        kinds = [piece.split(" ")[0] for piece in pieces if piece]
        assert kinds[0] == "data:"
        assert ":" in kinds
        assert pieces[-2] == "data: [DONE]"

    async def test_error_is_an_event_then(self, slow):
        slow.outcome = Conflict("no room", code="no_room")
        answer = await self.answered(slow)
        assert answer.status_code == 200
        last = answer.text.split("data: ")[-1]
        assert json.loads(last)["error"]["code"] == "no_room"

    async def test_bug_is_an_event_without_details(self, slow):
        slow.outcome = ZeroDivisionError("secret")
        answer = await self.answered(slow)
        last = json.loads(answer.text.split("data: ")[-1])
        assert last["error"]["type"] == "server_error"
        assert "secret" not in answer.text

    async def test_whole_answers_wait_in_silence(self, slow):
        answer = await self.answered(slow, stream=False)
        assert answer.json()["usage"]["completion_tokens"] == 3

    async def test_who_waits_for_anything_else_gets_a_status(self, slow):
        slow.routes.cold = dict
        slow.outcome = Conflict("no room", code="no_room")
        assert (await self.answered(slow)).status_code == 409

    async def test_client_that_hangs_up_meanwhile_leaves_nothing(self, slow):
        await asyncio.wait_for(hang_up(slow, after_events=2), 5)
        await slow.rest()
        assert (slow.ledger.records, await slow.ledger.open_holds()) == ([], [])


async def test_bug_is_a_500_without_details():
    here = await gateway()
    here.routes.engine = lambda route: 1 / 0
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
                if cancel:
                    task.cancel()
                else:
                    gone.set()
                await asyncio.Event().wait()  # a full socket: this send never ends

    task = asyncio.create_task(here.app(SCOPE, receive, send))
    await asyncio.gather(task, return_exceptions=True)


async def test_client_that_hangs_up_without_a_stream_aborts_the_engine_too():
    here = await gateway(gate=asyncio.Semaphore(3))
    gone = asyncio.Event()
    body = json.dumps(CHAT | {"max_tokens": 900}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    asking = asyncio.create_task(here.app(SCOPE, receive, send))
    while not here.engine.requests or not here.engine.gate.locked():
        await asyncio.sleep(0)
    gone.set()
    await asyncio.wait_for(asking, 5)
    record = await here.record()
    assert record.finish_reason is FinishReason.CLIENT_DISCONNECT
    assert record.output_tokens == 3
    assert here.engine.aborted


async def test_client_that_hangs_up_aborts_the_engine_and_pays_what_was_generated():
    here = await gateway()
    await asyncio.wait_for(hang_up(here, after_events=4), 5)
    record = await here.record()
    assert record.finish_reason is FinishReason.CLIENT_DISCONNECT
    assert record.output_tokens == 4
    assert here.engine.aborted


async def test_gateway_that_ends_before_an_answer_does_charges_nothing():
    here = await gateway()
    await asyncio.wait_for(hang_up(here, after_events=4, cancel=True), 5)
    record = await here.record()
    assert record.finish_reason is FinishReason.MARKET_FAULT
    assert (record.output_tokens, record.charge_pico) == (4, 0)
    assert here.engine.aborted


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_that_we_cannot_write_down_charges_nothing(stream, monkeypatch):
    def broken(*_arguments):
        raise ValueError("not writable")

    monkeypatch.setattr("serve_apps.shapes.ChatShape.add", broken)
    monkeypatch.setattr("serve_apps.shapes.ChatShape.pieces", broken)
    here = await gateway()
    answer = await here.http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    assert "internal error" in answer.text
    record = await here.record()
    assert (record.finish_reason, record.charge_pico) == (FinishReason.MARKET_FAULT, 0)


async def test_log_probabilities_that_no_whole_answer_can_hold_are_refused():
    here = await gateway()
    many = {"n": 128, "logprobs": True, "top_logprobs": 20, "max_tokens": 500}
    answer = await here.http.post("/v1/chat/completions", json=CHAT | many)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")


class TestKeys:
    async def test_are_looked_up_once_as_long_as_nothing_changes(self):
        here = await gateway()
        for _ in range(5):
            assert (await here.http.get("/v1/models")).status_code == 200
            here.clock.advance(3)
            await here.authenticator.poll()
        assert here.keys.lookups == 1

    async def test_are_looked_up_again_when_any_has_changed(self):
        here = await gateway()
        await here.http.get("/v1/models")
        here.keys.version += 1
        await here.authenticator.poll()
        await here.http.get("/v1/models")
        assert here.keys.lookups == 2

    async def test_are_not_trusted_for_long_without_news(self):
        here = await gateway()
        await here.http.get("/v1/models")
        here.clock.advance(4.5)
        await here.http.get("/v1/models")
        assert here.keys.lookups == 2

    async def test_that_have_expired_say_when(self):
        here = await gateway()
        policy = KeyPolicy(expires_at=here.clock.now())
        KEYS["sk-old"] = dataclasses.replace(ACME, policy=policy)
        answer = await here.http.get("/v1/models", headers={"authorization": "Bearer sk-old"})
        del KEYS["sk-old"]
        assert answer.status_code == 401
        assert "expired at 2026-11-01" in answer.json()["error"]["message"]

    async def test_old_secret_ends_although_it_is_remembered_and_cannot_rotate(self):
        here = await gateway()
        until = here.clock.now() + timedelta(seconds=2)
        KEYS["sk-before"] = dataclasses.replace(ACME, secret_until=until)
        headers = {"authorization": "Bearer sk-before"}
        good = await here.http.get("/v1/models", headers=headers)
        url = f"/market/v1/keys/{ACME.api_key_id}/rotate"
        rotating = await here.http.post(url, json={"overlap": "0"}, headers=headers)
        here.clock.advance(2)
        over = await here.http.get("/v1/models", headers=headers)
        del KEYS["sk-before"]
        assert [a.status_code for a in (good, rotating, over)] == [200, 403, 401]
        assert "old secret" in rotating.json()["error"]["message"]

    async def test_that_may_only_read_cannot_ask(self):
        here = await gateway()
        KEYS["sk-read"] = dataclasses.replace(ACME, policy=KeyPolicy(read_only=True))
        headers = {"authorization": "Bearer sk-read"}
        reading = await here.http.get("/v1/models", headers=headers)
        asking = await here.http.post("/v1/chat/completions", json=CHAT, headers=headers)
        own = await here.http.post("/market/v1/tenants", json={}, headers=headers)
        del KEYS["sk-read"]
        assert reading.status_code == 200
        assert (asking.status_code, asking.json()["error"]["code"]) == (403, "read_only_key")
        assert own.status_code == 403

    async def test_are_for_some_models_only(self):
        here = await gateway()
        KEYS["sk-other"] = dataclasses.replace(ACME, policy=KeyPolicy(models=("other",)))
        headers = {"authorization": "Bearer sk-other"}
        asking = await here.http.post("/v1/chat/completions", json=CHAT, headers=headers)
        del KEYS["sk-other"]
        assert (asking.status_code, asking.json()["error"]["code"]) == (403, "model_not_allowed")

    async def test_have_limits_and_say_so(self):
        here = await gateway()
        KEYS["sk-slow"] = dataclasses.replace(
            ACME, policy=KeyPolicy(requests_per_min=2, tokens_per_min=1000)
        )
        headers = {"authorization": "Bearer sk-slow"}
        asked = [
            await here.http.post("/v1/chat/completions", json=CHAT, headers=headers)
            for _ in range(3)
        ]
        del KEYS["sk-slow"]
        assert [a.status_code for a in asked] == [200, 200, 429]
        assert asked[0].headers["x-ratelimit-limit-requests"] == "2"
        assert asked[0].headers["x-ratelimit-remaining-requests"] == "1"
        assert asked[1].headers["x-ratelimit-remaining-tokens"] == "974"
        assert asked[1].headers["x-ratelimit-reset-requests"] == "1m0s"
        assert asked[2].headers["x-ratelimit-remaining-requests"] == "0"
        assert asked[2].json()["error"]["code"] == "rate_limit_exceeded"
        assert asked[2].headers["retry-after"] == "30"
        assert asked[2].headers["x-should-retry"] == "true"

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

    async def test_wrong_ones_cost_one_look(self):
        here = await gateway()
        headers = {"authorization": "Bearer sk-new"}
        for _ in range(3):
            assert (await here.http.get("/v1/models", headers=headers)).status_code == 401
        assert here.keys.lookups == 1
        KEYS["sk-new"] = ACME
        here.keys.version += 1
        await here.authenticator.poll()
        answer = await here.http.get("/v1/models", headers=headers)
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


KEYED = {"idempotency-key": "order-1"}


class TestIdempotency:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_same_request_again_is_answered_from_the_store(self, stream):
        here = await gateway()
        body = CHAT | {"stream": stream}
        first = await here.http.post("/v1/chat/completions", json=body, headers=KEYED)
        await here.idempotency.drain()
        again = await here.http.post("/v1/chat/completions", json=body, headers=KEYED)
        assert again.content == first.content
        assert again.headers["idempotency-replayed"] == "true"
        assert again.headers["x-request-id"] == first.headers["x-request-id"]
        assert again.headers["content-type"] == first.headers["content-type"]
        await here.record()

    async def test_another_body_is_422(self):
        here = await gateway()
        await here.http.post("/v1/chat/completions", json=CHAT, headers=KEYED)
        other = CHAT | {"max_tokens": 2}
        answer = await here.http.post("/v1/chat/completions", json=other, headers=KEYED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (
            422,
            "idempotency_key_reused",
        )

    async def test_while_it_runs_is_409(self):
        here = await gateway(gate=asyncio.Semaphore(0))
        asking = asyncio.create_task(
            here.http.post("/v1/chat/completions", json=CHAT, headers=KEYED)
        )
        while not here.engine.requests:
            await asyncio.sleep(0)
        answer = await here.http.post("/v1/chat/completions", json=CHAT, headers=KEYED)
        assert answer.status_code == 409
        assert answer.headers["x-should-retry"] == "true"
        for _ in range(3):
            here.engine.gate.release()
        assert (await asking).status_code == 200

    async def test_failure_frees_the_key(self):
        here = await gateway(fail_at=0, failures=2)
        failed = await here.http.post("/v1/chat/completions", json=CHAT, headers=KEYED)
        answer = await here.http.post("/v1/chat/completions", json=CHAT, headers=KEYED)
        assert (failed.status_code, answer.status_code) == (500, 200)

    async def test_failure_inside_a_stream_frees_the_key(self):
        here = await gateway(fail_at=2, failures=1)
        body = CHAT | {"stream": True}
        await here.http.post("/v1/chat/completions", json=body, headers=KEYED)
        await here.idempotency.drain()
        answer = await here.http.post("/v1/chat/completions", json=body, headers=KEYED)
        assert answer.text.endswith("data: [DONE]\n\n")

    async def test_client_that_hangs_up_finds_the_answer_later(self):
        here = await gateway()
        SCOPE["headers"].append((b"idempotency-key", b"order-1"))
        await asyncio.wait_for(hang_up(here, after_events=2), 5)
        SCOPE["headers"].pop()
        await here.idempotency.drain()
        body = json.dumps(CHAT | {"stream": True, "max_tokens": 900})
        answer = await here.http.post("/v1/chat/completions", content=body, headers=KEYED)
        assert answer.headers["idempotency-replayed"] == "true"
        assert answer.text.count('"content":"') == 901
        record = await here.record()
        assert (record.finish_reason, record.output_tokens) == (FinishReason.LENGTH, 900)

    async def test_keys_have_a_length(self):
        here = await gateway()
        headers = {"idempotency-key": "x" * 256}
        answer = await here.http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert answer.status_code == 400


class TestShapes:
    async def test_several_answers_are_choices(self):
        here = await gateway()
        answer = (await here.http.post("/v1/chat/completions", json=CHAT | {"n": 3})).json()
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
        assert {c["message"]["content"] for c in answer["choices"]} == {"0 1 2 "}
        assert answer["usage"]["completion_tokens"] == 9
        assert answer["usage"]["prompt_tokens"] == 10

    async def test_several_answers_stream_with_their_index(self):
        here = await gateway()
        body = CHAT | {"n": 2, "stream": True}
        *chunks, _ = events(await here.http.post("/v1/chat/completions", json=body))
        texts = ["", ""]
        for chunk in map(json.loads, chunks):
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
        assert texts == ["0 1 2 ", "0 1 2 "]

    async def test_several_prompts_are_choices_in_order(self):
        here = await gateway()
        body = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 2, "n": 2}
        answer = (await here.http.post("/v1/completions", json=body)).json()
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"] | {"cost": ""} == {
            "prompt_tokens": 20,
            "completion_tokens": 8,
            "total_tokens": 28,
            "prompt_tokens_details": {"cached_tokens": 0},
            "cost": "",
        }

    async def test_echo_repeats_the_prompt(self):
        here = await gateway()
        body = {"model": "tiny", "prompt": "question: ", "max_tokens": 2, "echo": True}
        whole = (await here.http.post("/v1/completions", json=body)).json()
        assert whole["choices"][0]["text"] == "question: 0 1 "
        only = (await here.http.post("/v1/completions", json=body | {"max_tokens": 0})).json()
        assert only["choices"][0]["text"] == "question: "
        *chunks, _ = events(await here.http.post("/v1/completions", json=body | {"stream": True}))
        assert json.loads(chunks[0])["choices"][0]["text"] == "question: 0 "

    async def test_service_tier_is_said_if_it_was_asked(self):
        here = await gateway()
        asked = await here.http.post("/v1/chat/completions", json=CHAT | {"service_tier": "auto"})
        assert asked.json()["service_tier"] == "default"
        assert (
            "service_tier" not in (await here.http.post("/v1/chat/completions", json=CHAT)).json()
        )

    async def test_responses_are_a_message(self):
        here = await gateway()
        body = {"model": "tiny", "input": "hi", "max_output_tokens": 3}
        answer = (await here.http.post("/v1/responses", json=body)).json()
        assert (answer["object"], answer["status"]) == ("response", "incomplete")
        assert answer["output"][0]["content"][0]["text"] == "0 1 2 "
        assert answer["usage"]["output_tokens"] == 3

    async def test_responses_stream_their_events_in_order(self):
        here = await gateway(stop_after=3)
        body = {"model": "tiny", "input": "hi", "stream": True}
        answer = await here.http.post("/v1/responses", json=body)
        lines = [line for line in answer.text.split("\n\n") if line]
        kinds = [line.split("\n")[0].removeprefix("event: ") for line in lines]
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            *["response.output_text.delta"] * 3,
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        numbers = [json.loads(line.split("data: ")[1])["sequence_number"] for line in lines]
        assert numbers == list(range(len(lines)))
