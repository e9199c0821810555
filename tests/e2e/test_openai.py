"""The OpenAI SDK against the real vLLM engine: answers, counts, charges, errors."""

import json
from decimal import Decimal

import httpx
import openai
import pytest

from market import catalog, pricing
from market.types import FinishReason, Lane, TokenCounts
from tests.e2e.conftest import wait_until

pytestmark = pytest.mark.timeout(300)

HI = [{"role": "user", "content": "What is a list?"}]
LONG = {"ignore_eos": True}


def expected_charge(usage):
    counts = TokenCounts(
        usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens
    )
    (card,) = [card for card in catalog.default_rate_cards() if card.model == "tiny-qwen"]
    return pricing.to_decimal(pricing.charge(counts, card, FinishReason.STOP, Lane.TOKENS))


def check_books(tenant, usage, request_id):
    """HTTP response = Parquet row = replica's own count; balance = deposit - charge, exactly."""
    (row,) = tenant.rows(1).to_dict("records")
    assert row["request_id"] == request_id
    assert row["input_tokens"] == usage.prompt_tokens
    assert row["output_tokens"] == usage.completion_tokens == row["claimed_output_tokens"]
    assert row["cached_input_tokens"] == usage.prompt_tokens_details.cached_tokens
    assert row["charge"] == Decimal(usage.cost) == expected_charge(usage)
    balance = tenant.balance()
    assert Decimal(balance["balance"]) == 10 - row["charge"]
    assert Decimal(balance["held"]) >= 0
    wait_until(lambda: tenant.transfers_balance() == 10 - row["charge"], "the transfer's seal")
    return row


class TestChat:
    def test_whole_answer(self, tenant):
        raw = tenant.client().chat.completions.with_raw_response.create(
            model="tiny-qwen", messages=HI, max_tokens=12, extra_body=LONG
        )
        answer = raw.parse()
        assert answer.object == "chat.completion"
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 12
        row = check_books(tenant, answer.usage, raw.headers["x-request-id"])
        assert raw.headers["x-market-lane"] == "tokens" == row["lane"]
        assert raw.headers["x-market-provider"] == "local" == row["provider_id"]
        assert raw.headers["x-market-price-id"] == row["price_id"]
        assert Decimal(raw.headers["x-market-cost"]) == row["charge"]
        assert (row["node_id"], row["gpu_type"], row["gpu_milli"]) == ("local", "cpu", 0)
        assert 0 <= row["queue_ms"] <= row["ttft_ms"] <= row["duration_ms"]

    def test_streamed_answer(self, tenant):
        with tenant.client().chat.completions.create(
            model="tiny-qwen",
            messages=HI,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=LONG,
        ) as stream:
            request_id = stream.response.headers["x-request-id"]
            chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert chunks[-1].choices == []
        assert len({chunk.id for chunk in chunks}) == 1
        check_books(tenant, chunks[-1].usage, request_id)

    def test_streamed_text_is_the_whole_text(self, tenant):
        asked = {"model": "tiny-qwen", "messages": HI, "max_tokens": 40, "temperature": 0}
        client = tenant.client()
        whole = client.chat.completions.create(**asked, extra_body=LONG)
        stream = client.chat.completions.create(**asked, stream=True, extra_body=LONG)
        pieces = [c.choices[0].delta.content or "" for c in stream if c.choices]
        assert "".join(pieces) == whole.choices[0].message.content

    def test_without_include_usage_there_is_none_but_the_row_is_there(self, tenant):
        stream = tenant.client().chat.completions.create(
            model="tiny-qwen", messages=HI, max_tokens=5, stream=True, extra_body=LONG
        )
        assert all(chunk.usage is None and chunk.choices for chunk in stream)
        assert list(tenant.rows(1)["output_tokens"]) == [5]

    def test_second_time_the_prompt_is_cached_and_cheaper(self, tenant):
        messages = [{"role": "user", "content": "lists and tuples " * 40}]
        ask = {"model": "tiny-qwen", "messages": messages, "max_tokens": 2, "extra_body": LONG}
        first = tenant.client().chat.completions.create(**ask)
        again = tenant.client().chat.completions.create(**ask)
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        assert again.usage.prompt_tokens_details.cached_tokens > 0
        assert Decimal(again.usage.cost) < Decimal(first.usage.cost)
        stranger = tenant.market.tenant().client().chat.completions.create(**ask)
        assert stranger.usage.prompt_tokens_details.cached_tokens == 0

    def test_sampling_parameters_reach_the_engine(self, tenant):
        asked = {"model": "tiny-qwen", "messages": HI, "max_tokens": 20, "extra_body": LONG}
        create = tenant.client().chat.completions.create
        answers = [create(**asked, seed=7).choices[0].message.content for _ in range(2)]
        assert answers[0] == answers[1]
        biased = create(**asked, logit_bias={"300": 100})
        assert len(set(biased.choices[0].message.content.replace(" ", ""))) <= 12
        whole = create(**asked, temperature=0).choices[0].message.content
        stop = whole[5:8]
        cut = create(**asked, temperature=0, stop=stop)
        assert cut.choices[0].message.content == whole[: whole.index(stop)]
        assert cut.choices[0].finish_reason == "stop"


class TestCompletions:
    def test_whole_and_streamed_agree(self, tenant):
        asked = {"model": "tiny-qwen", "prompt": "A list is", "max_tokens": 20, "temperature": 0}
        client = tenant.client()
        whole = client.completions.create(**asked, extra_body=LONG)
        stream = client.completions.create(**asked, stream=True, extra_body=LONG)
        assert whole.object == "text_completion"
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
        assert set(tenant.rows(2)["output_tokens"]) == {20}

    def test_token_ids_are_a_prompt(self, tenant):
        answer = tenant.client().completions.create(
            model="tiny-qwen", prompt=[50, 60, 70], max_tokens=3, extra_body=LONG
        )
        assert answer.usage.prompt_tokens == 3

    def test_default_is_sixteen_tokens(self, tenant):
        answer = tenant.client().completions.create(model="tiny-qwen", prompt="A", extra_body=LONG)
        assert answer.usage.completion_tokens == 16


class TestModels:
    def test_are_listed_and_found(self, tenant):
        client = tenant.client()
        assert [model.id for model in client.models.list()] == ["tiny-qwen"]
        assert client.models.retrieve("tiny-qwen").id == "tiny-qwen"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-9")


class TestErrors:
    def test_wrong_key_is_401(self, tenant):
        wrong = openai.OpenAI(base_url=tenant.base_url, api_key="sk-market-wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as caught:
            wrong.chat.completions.create(model="tiny-qwen", messages=HI)
        assert caught.value.code == "invalid_api_key"

    def test_no_key_is_401(self, tenant):
        answer = httpx.post(f"{tenant.base_url}/chat/completions", json={})
        assert answer.status_code == 401
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    def test_unknown_model_is_404(self, tenant):
        with pytest.raises(openai.NotFoundError) as caught:
            tenant.client().chat.completions.create(model="gpt-9", messages=HI)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")

    def test_empty_balance_is_402_and_not_retried(self, vllm_market):
        poor = vllm_market.tenant("0")
        with pytest.raises(openai.APIStatusError) as caught:
            poor.client(max_retries=2).chat.completions.create(model="tiny-qwen", messages=HI)
        assert caught.value.status_code == 402
        assert caught.value.code == "insufficient_balance"
        assert caught.value.response.headers["x-should-retry"] == "false"

    def test_short_balance_ends_with_length_on_the_wire_and_budget_in_the_ledger(self, vllm_market):
        # 256 tokens of output and a prompt cost 0.0001024 and a bit
        short = vllm_market.tenant("0.00012")
        answer = short.client().chat.completions.create(
            model="tiny-qwen", messages=HI, max_tokens=1000, extra_body=LONG
        )
        assert answer.choices[0].finish_reason == "length"
        (row,) = short.rows(1).to_dict("records")
        assert row["finish_reason"] == "budget"
        assert 256 <= row["output_tokens"] < 1000
        assert 0 <= Decimal(short.balance()["balance"]) < Decimal("0.0000004")

    @pytest.mark.parametrize(
        ("content", "param"),
        [
            (b"{", None),
            (b"[]", None),
            (json.dumps({"model": "tiny-qwen"}).encode(), "messages"),
            (json.dumps({"model": "tiny-qwen", "messages": "hi"}).encode(), "messages"),
            (
                json.dumps({"model": "tiny-qwen", "messages": HI, "temperature": 9}).encode(),
                "temperature",
            ),
        ],
    )
    def test_malformed_body_is_400(self, tenant, content, param):
        answer = httpx.post(
            f"{tenant.base_url}/chat/completions",
            content=content,
            headers={"authorization": f"Bearer {tenant.key}"},
        )
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)

    def test_too_long_is_400(self, tenant):
        client = tenant.client()
        for asked in (
            {"messages": [{"role": "user", "content": "word " * 3000}]},
            {"messages": HI, "max_tokens": 3000},
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="tiny-qwen", **asked)
            assert caught.value.code == "context_length_exceeded"
        assert tenant.balance() == tenant.balance() | {"balance": "10", "held": "0"}

    def test_operator_key_cannot_buy(self, vllm_market, tenant):
        key = (vllm_market.home / "operator.key").read_text().strip()
        operator = openai.OpenAI(base_url=tenant.base_url, api_key=key, max_retries=0)
        with pytest.raises(openai.PermissionDeniedError):
            operator.chat.completions.create(model="tiny-qwen", messages=HI)

    def test_unknown_address_is_404_in_openai_form(self, tenant):
        answer = httpx.get(f"{tenant.base_url}/nothing")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")

    def test_rejected_requests_leave_no_row_and_no_hold(self, vllm_market):
        poor = vllm_market.tenant("0")
        with pytest.raises(openai.APIStatusError):
            poor.client().chat.completions.create(model="tiny-qwen", messages=HI)
        rich = vllm_market.tenant()
        rich.client().completions.create(model="tiny-qwen", prompt="A", max_tokens=1)
        rich.rows(1)  # sealed later than any row of poor would have been
        assert (vllm_market.ledger()["tenant_id"] != poor.name).all()


class TestHangUp:
    def test_bills_what_was_generated_until_the_abort(self, tenant):
        for tries in range(1, 6):
            with tenant.client().chat.completions.create(
                model="tiny-qwen", messages=HI, max_tokens=1500, stream=True, extra_body=LONG
            ) as stream:
                for _, _chunk in zip(range(5), stream, strict=False):
                    pass
            rows = tenant.rows(tries).sort_values("lsn")
            row = rows.iloc[-1]
            if row["finish_reason"] != "length":  # on a busy machine the answer may end before
                break
        assert row["finish_reason"] == "client_disconnect"
        assert 1 <= row["output_tokens"] < 1500
        assert row["charge"] > 0
        assert tenant.settled() == 10 - rows["charge"].sum()

    def test_of_a_whole_answer_aborts_too(self, tenant):
        """Engines on all CPUs may keep this process from running until its answer is there."""
        client, answers = tenant.client(timeout=0.5), []

        def ask():
            while len(answers) < 10:
                answers.append(
                    client.chat.completions.create(
                        model="tiny-qwen", messages=HI, max_tokens=2000, extra_body=LONG
                    )
                )

        with pytest.raises(openai.APITimeoutError):
            ask()
        row = tenant.rows(len(answers) + 1).sort_values("lsn").iloc[-1]
        assert row["finish_reason"] == "client_disconnect"
        assert row["output_tokens"] < 2000


class TestAccess:
    def test_tenant_sees_itself_only(self, vllm_market, tenant):
        other = vllm_market.tenant()
        headers = {"authorization": f"Bearer {tenant.key}"}
        url = f"{vllm_market.url}/market/v1"
        assert httpx.get(f"{url}/tenants/{tenant.name}", headers=headers).status_code == 200
        assert httpx.get(f"{url}/tenants/{other.name}", headers=headers).status_code == 403
        assert httpx.get(f"{url}/tenants", headers=headers).status_code == 403
        usage = httpx.get(f"{url}/usage?tenant={other.name}", headers=headers)
        assert usage.status_code == 403
        deposit = httpx.post(
            f"{url}/tenants/{tenant.name}/deposits",
            json={"amount": "1000", "deposit_id": "mine"},
            headers=headers,
        )
        assert deposit.status_code == 403

    def test_revoked_key_stops_working_within_five_seconds(self, vllm_market, tenant):
        client = tenant.client()
        client.models.list()
        (key,) = [k for k in vllm_market.get("/keys") if k["subject_id"] == tenant.name]
        vllm_market.cli("keys", "revoke", key["api_key_id"])

        def refused():
            try:
                client.models.list()
            except openai.AuthenticationError:
                return True
            return False

        wait_until(refused, "refusal of the revoked key", timeout_s=5)

    def test_secrets_are_in_no_file_but_the_users_own(self, vllm_market, tenant):
        tenant.client().completions.create(
            model="tiny-qwen", prompt="A secret prompt", max_tokens=1
        )
        tenant.rows(1)
        head = json.loads((vllm_market.home / "state" / "cluster.json").read_text())
        from pathlib import Path

        for root in (vllm_market.home, Path(head["temp_dir"]).resolve()):
            for file in root.rglob("*"):
                if file.is_file() and not file.is_symlink() and file.name != "operator.key":
                    content = file.read_bytes()
                    assert tenant.key.encode() not in content, file
                    assert b"secret prompt" not in content, file
