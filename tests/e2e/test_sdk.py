"""What OpenAI's SDK offers, unchanged, against the real vLLM engine; and what keys may spend."""

import asyncio
import base64
import json
import struct
import time
from decimal import Decimal
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.e2e.conftest import Tenant, wait_until

pytestmark = pytest.mark.timeout(300)

HI = [{"role": "user", "content": "What is a list?"}]
LONG = {"ignore_eos": True}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Bern", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


class Verdict(BaseModel):
    answer: Literal["yes", "no"]
    sure: bool


def chat(client, **more):
    return client.chat.completions.create(
        **{"model": "tiny-qwen", "messages": HI, "max_tokens": 12, "extra_body": LONG} | more
    )


def check_calls(answer, count=None):
    """An untrained model that must call may do so more than once, but always by the schema."""
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert count in (None, len(calls))
    for call in calls:
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments)["city"] in ("Bern", "Oslo")


class TestTools:
    @pytest.mark.parametrize("choice", ["required", NAMED])
    def test_call_is_parsed_and_fits_the_schema(self, tenant, choice):
        answer = chat(
            tenant.client(),
            tools=[WEATHER],
            tool_choice=choice,
            max_tokens=1000,
            seed=3,
            extra_body={},
        )
        check_calls(answer, 1 if choice is NAMED else None)
        assert answer.choices[0].finish_reason == ("stop" if choice is NAMED else "tool_calls")
        (row,) = tenant.rows(1).to_dict("records")
        assert row["finish_reason"] == answer.choices[0].finish_reason

    def test_stream_helper_gathers_the_call(self, tenant):
        with tenant.client().chat.completions.stream(
            model="tiny-qwen",
            messages=HI,
            tools=[WEATHER],
            tool_choice="required",
            max_tokens=1000,
            seed=3,
        ) as stream:
            kinds = {event.type for event in stream}
            answer = stream.get_final_completion()
        assert "tool_calls.function.arguments.done" in kinds
        check_calls(answer)

    def test_results_of_tools_are_part_of_the_conversation(self, tenant):
        called = {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call-1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'},
                }
            ],
        }
        result = {"role": "tool", "tool_call_id": "call-1", "content": "rain"}
        with_result = chat(tenant.client(), messages=[*HI, called, result], tools=[WEATHER])
        assert with_result.usage.prompt_tokens > chat(tenant.client()).usage.prompt_tokens

    def test_auto_without_a_call_is_plain_text(self, tenant):
        answer = chat(tenant.client(), tools=[WEATHER], tool_choice="auto")
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].message.content


class TestStructuredOutput:
    def test_parse_helper_gives_the_object(self, tenant):
        answer = tenant.client().chat.completions.parse(
            model="tiny-qwen", messages=HI, response_format=Verdict, max_tokens=400
        )
        assert isinstance(answer.choices[0].message.parsed, Verdict)

    def test_json_mode_gives_json(self, tenant):
        answer = chat(
            tenant.client(),
            response_format={"type": "json_object"},
            max_tokens=400,
            extra_body={},
            temperature=0,
        )
        text = answer.choices[0].message.content
        assert text.lstrip().startswith("{")
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text), dict)

    def test_vllm_forms_work_too(self, tenant):
        asked = {"structured_outputs": {"choice": ["left", "right"]}}
        answer = chat(tenant.client(), extra_body=asked)
        assert answer.choices[0].message.content in ("left", "right")

    def test_broken_schema_is_400_and_free(self, tenant):
        with pytest.raises(openai.BadRequestError):
            chat(tenant.client(), extra_body={"structured_outputs": {"regex": "("}})
        assert tenant.settled() == 10


class TestSeveralAnswers:
    def test_n_are_all_charged(self, tenant):
        answer = chat(tenant.client(), n=3, temperature=1.0)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert len({choice.message.content for choice in answer.choices}) > 1
        assert answer.usage.completion_tokens == 36
        (row,) = tenant.rows(1).to_dict("records")
        assert row["output_tokens"] == 36
        assert tenant.settled() == 10 - row["charge"]

    def test_lists_of_prompts_and_streams_of_them(self, tenant):
        client = tenant.client()
        asked = {"model": "tiny-qwen", "prompt": [[40], [41, 42], [43]], "max_tokens": 4}
        whole = client.completions.create(**asked, temperature=0, extra_body=LONG)
        assert [choice.index for choice in whole.choices] == [0, 1, 2]
        texts = {0: "", 1: "", 2: ""}
        for chunk in client.completions.create(
            **asked, temperature=0, extra_body=LONG, stream=True
        ):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == {choice.index: choice.text for choice in whole.choices}


class TestLogprobs:
    def test_of_chats(self, tenant):
        answer = chat(tenant.client(), logprobs=True, top_logprobs=3, temperature=0)
        content = answer.choices[0].logprobs.content
        assert len(content) == 12
        for place in content:
            assert len(place.top_logprobs) == 3
            assert place.logprob == place.top_logprobs[0].logprob <= 0
            assert place.bytes is not None

    def test_of_completions_with_the_prompt_echoed(self, tenant):
        answer = tenant.client().completions.create(
            model="tiny-qwen", prompt=[40, 41, 42], max_tokens=0, echo=True, logprobs=1
        )
        found = answer.choices[0].logprobs
        assert len(found.tokens) == 3
        assert found.token_logprobs[0] is None
        assert all(value <= 0 for value in found.token_logprobs[1:])


class TestResponses:
    def test_whole(self, tenant):
        answer = tenant.client().responses.create(
            model="tiny-qwen", input="What is a list?", max_output_tokens=8, extra_body=LONG
        )
        assert answer.status in ("completed", "incomplete")
        assert answer.output_text
        assert answer.usage.output_tokens == 8
        (row,) = tenant.rows(1).to_dict("records")
        assert row["output_tokens"] == 8

    def test_streamed(self, tenant):
        events = list(
            tenant.client().responses.create(
                model="tiny-qwen",
                input="What is a list?",
                max_output_tokens=8,
                stream=True,
                extra_body=LONG,
            )
        )
        kinds = [event.type for event in events]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] == "response.incomplete"  # cut by its own limit
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        assert text == events[-1].response.output_text
        assert [event.sequence_number for event in events] == list(range(len(events)))


class TestAsync:
    async def test_streams_side_by_side(self, tenant):
        async def one(client, length):
            usage = None
            stream = await chat(
                client,
                max_tokens=length,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                usage = chunk.usage or usage
            return usage.completion_tokens

        async with tenant.async_client() as client:
            lengths = list(range(1, 33))
            assert await asyncio.gather(*(one(client, n) for n in lengths)) == lengths


class TestServiceTier:
    def test_what_was_served_is_said(self, tenant):
        assert chat(tenant.client(), service_tier="auto").service_tier == "default"


class TestIdempotency:
    def test_same_key_and_body_is_answered_and_charged_once(self, tenant):
        client = tenant.client()
        headers = {"Idempotency-Key": "order-1"}
        first = chat(client, temperature=1.0, extra_headers=headers)
        again = chat(client, temperature=1.0, extra_headers=headers)
        assert again.id == first.id
        assert again.choices[0].message.content == first.choices[0].message.content
        with pytest.raises(openai.UnprocessableEntityError):
            chat(client, temperature=0.5, extra_headers=headers)
        assert len(tenant.rows(1)) == 1

    def test_another_tenants_key_is_another(self, vllm_market, tenant):
        other = vllm_market.tenant()
        headers = {"Idempotency-Key": "order-1"}
        assert chat(tenant.client(), extra_headers=headers).id != (
            chat(other.client(), extra_headers=headers).id
        )


def another_key(market, tenant, *options):
    key = market.cli("keys", "create", "--tenant", tenant.name, "--no-save", *options)
    return Tenant(market, tenant.name, key["api_key"]), key["api_key_id"]


def until_refused(who):
    """(answers, the refusal); as a client does, asks again when told to."""
    done = 0
    for _ in range(50):
        try:
            chat(who.client())
        except openai.APIStatusError as error:
            if error.code != "in_flight_budget_exhausted":
                return done, error
            time.sleep(float(error.response.headers["retry-after"]))  # an answer is being booked
        else:
            done += 1
    raise AssertionError("never refused")


class TestKeys:
    def test_scopes_bind(self, vllm_market, tenant):
        reader, _ = another_key(vllm_market, tenant, "--read-only")
        with pytest.raises(openai.PermissionDeniedError):
            chat(reader.client())
        assert reader.client().models.list().data
        scoped, _ = another_key(vllm_market, tenant, "--model", "qwen-7b")
        with pytest.raises(openai.PermissionDeniedError):
            chat(scoped.client())
        assert scoped.client().models.list().data == []

    def test_limits_are_told_and_kept(self, vllm_market, tenant):
        limited, _ = another_key(vllm_market, tenant, "--rpm", "2", "--tpm", "100000")
        raw = limited.client().chat.completions.with_raw_response.create(
            model="tiny-qwen", messages=HI, max_tokens=3
        )
        assert raw.headers["x-ratelimit-limit-requests"] == "2"
        assert raw.headers["x-ratelimit-remaining-requests"] == "1"
        assert 99_000 < int(raw.headers["x-ratelimit-remaining-tokens"]) <= 100_000
        chat(limited.client())
        with pytest.raises(openai.RateLimitError) as caught:
            chat(limited.client())
        headers = caught.value.response.headers
        assert 1 <= int(headers["retry-after"]) <= 30
        assert headers["x-should-retry"] == "true"

    def test_rotation_overlaps_and_revocation_ends_both(self, vllm_market, tenant):
        old, key_id = another_key(vllm_market, tenant)
        fresh = vllm_market.cli("keys", "rotate", key_id, "--overlap", "1h")["api_key"]
        new = Tenant(vllm_market, tenant.name, fresh)
        chat(old.client())
        chat(new.client())
        vllm_market.cli("keys", "revoke", key_id)

        def refused(who):
            try:
                chat(who.client())
            except openai.AuthenticationError:
                return True
            return False

        wait_until(lambda: refused(old) and refused(new), "the keys' end", 5)

    def test_own_budget_spent_is_402_with_its_reset(self, vllm_market, tenant):
        poor, key_id = another_key(vllm_market, tenant, "--budget", "0.00002/day")
        done, error = until_refused(poor)
        assert done > 0
        assert (error.status_code, error.code) == (402, "budget_exceeded")
        assert error.body["metadata"]["resets_at"].endswith("+00:00")
        assert error.response.headers["x-should-retry"] == "false"
        chat(tenant.client())  # the tenant has money; its other keys may spend it
        spent = tenant.rows(done + 1)
        of_key = spent[spent["api_key_id"] == key_id]["charge"].sum()
        assert of_key <= Decimal("0.00002")

    def test_set_shows_and_lifts(self, vllm_market, tenant):
        _, key_id = another_key(vllm_market, tenant, "--rpm", "5", "--expires", "30d")
        shown = vllm_market.cli("keys", "set", key_id, "--unlimited", "rpm", "--budget", "1/hour")
        assert shown["policy"]["requests_per_min"] is None
        assert shown["policy"]["expires_at"] is not None
        assert shown["budgets"][0]["limit"] == "1"
        shown = vllm_market.cli("keys", "set", key_id, "--budget", "none/hour")
        assert shown["budgets"] == []
        done = vllm_market.run("keys", "ls")
        assert key_id in done.stdout


class TestPacks:
    def test_are_used_before_the_balance(self, vllm_market, tenant):
        bought = vllm_market.cli(
            "tenants", "buy-tokens", tenant.name, "tiny-qwen", "1000", "--discount", "50"
        )
        assert (bought["tokens_left"], bought["output_price"]) == (1000, "0.2")
        paid = Decimal(10) - Decimal("0.0002")
        answer = chat(tenant.client(), max_tokens=100)
        (row,) = tenant.rows(1).to_dict("records")
        assert row["price_id"] == bought["price_id"]
        assert Decimal(answer.usage.cost) == row["charge"]
        assert tenant.settled() == paid
        left = int(1000 - row["charge"] / Decimal("0.0000002"))
        wait_until(
            lambda: tenant.balance()["packs"][0]["tokens_left"] == left, "the pack's own slice ends"
        )
        chat(tenant.client(), max_tokens=1500)  # more than is left in it: the balance pays
        assert tenant.settled() < paid


def test_five_hundred_at_once_on_a_tenth_of_their_cost(vllm_market):
    """Each is complete, cut for want of money, or refused; what was served is charged, exactly."""
    length = 60
    cost = Decimal("0.0000004") * length  # of the output alone
    tenant = vllm_market.tenant(str(cost * 50))

    async def one(client):
        try:
            answer = await chat(client, max_tokens=length)
        except openai.APIStatusError as error:
            if error.status_code != 402:
                raise
            return None
        choice = answer.choices[0]
        assert choice.finish_reason == "length"
        return answer.usage.completion_tokens, Decimal(answer.usage.cost)

    async def everybody():
        limits = httpx.Limits(max_connections=500)
        async with openai.AsyncOpenAI(
            base_url=tenant.base_url,
            api_key=tenant.key,
            max_retries=0,
            timeout=250,
            http_client=httpx.AsyncClient(limits=limits, timeout=250),
        ) as client:
            return await asyncio.gather(*(one(client) for _ in range(500)))

    answers = [answer for answer in asyncio.run(everybody()) if answer is not None]
    assert 0 < len(answers) < 100
    left = tenant.settled()
    assert left >= 0
    assert left == cost * 50 - sum(charged for _, charged in answers)
    rows = tenant.rows(len(answers))
    assert rows["charge"].sum() == cost * 50 - left
    cut = rows["finish_reason"] == "budget"
    assert (rows.loc[cut, "output_tokens"] < length).all()
    assert (rows.loc[~cut, "output_tokens"] == length).all()


@pytest.fixture(scope="module")
def embedder(vllm_market, tiny_embed):
    (vllm_market.home / "models" / "tiny-embed").symlink_to(tiny_embed)
    vllm_market.cli("deploy", "tiny-embed", "--mode", "tokens")
    yield vllm_market
    vllm_market.cli("undeploy", "tiny-embed")


class TestEmbeddings:
    def test_are_charged_by_input(self, embedder, tenant):
        texts = ["bind a name", "bind names to values", "zebra"]
        answer = tenant.client().embeddings.create(model="tiny-embed", input=texts)
        assert [item.index for item in answer.data] == [0, 1, 2]
        vectors = [item.embedding for item in answer.data]
        assert {len(vector) for vector in vectors} == {128}
        assert all(sum(x * x for x in vector) == pytest.approx(1, abs=1e-4) for vector in vectors)
        (row,) = tenant.rows(1).to_dict("records")
        assert (row["input_tokens"], row["output_tokens"]) == (answer.usage.prompt_tokens, 0)
        assert row["charge"] == Decimal("0.00000002") * row["input_tokens"]
        assert tenant.settled() == 10 - row["charge"]

    def test_base64_and_floats_are_the_same(self, embedder, tenant):
        asked = {"model": "tiny-embed", "input": "bind a name"}
        headers = {"authorization": f"Bearer {tenant.key}"}
        forms = []
        for form in ("float", "base64"):
            body = asked | {"encoding_format": form}
            answer = httpx.post(f"{tenant.base_url}/embeddings", json=body, headers=headers)
            forms.append(answer.json()["data"][0]["embedding"])
        raw = base64.b64decode(forms[1])
        assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(forms[0])

    def test_models_do_what_they_can(self, embedder, tenant):
        with pytest.raises(openai.BadRequestError, match="embeddings only"):
            tenant.client().chat.completions.create(model="tiny-embed", messages=HI)
        with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
            tenant.client().embeddings.create(model="tiny-qwen", input="x")
