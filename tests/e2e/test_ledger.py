"""The ledger as operators, tenants and auditors use it, over the CLI and HTTP."""

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import httpx
import pandas as pd
import pytest

from tests.e2e.conftest import wait_until

pytestmark = pytest.mark.timeout(300)

HI = [{"role": "user", "content": "What is a list?"}]
SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


@pytest.fixture(scope="module")
def served(vllm_market):
    """A tenant with three answers on record."""
    tenant = vllm_market.tenant()
    for tokens in (5, 6, 7):
        tenant.client().chat.completions.create(
            model="tiny-qwen", messages=HI, max_tokens=tokens, extra_body={"ignore_eos": True}
        )
    tenant.rows(3)
    return tenant


def period(vllm_market):
    return f"{vllm_market.ledger()['booked_at'].max():%Y-%m}"


def get(tenant, path, key=None, **parameters):
    headers = {"authorization": f"Bearer {key or tenant.key}"}
    url = f"{tenant.market.url}{path}"
    return httpx.get(url, headers=headers, params=parameters, timeout=120)


def test_verifies(vllm_market, served):
    report = vllm_market.cli("ledger", "verify")
    assert report["finding"] is None
    assert report["rows"] >= 3


def test_proof_convinces_a_stranger_who_kept_the_key(vllm_market, served, tmp_path):
    row = served.rows(3).iloc[0]
    proof = vllm_market.cli_plain("ledger", "prove", row["request_id"])
    (tmp_path / "proof.json").write_text(proof)
    public = (vllm_market.home / "proof" / "ledger.pub").read_text().strip()
    command = [sys.executable, str(SCRIPTS / "verify_proof.py"), str(tmp_path / "proof.json")]
    done = subprocess.run(
        [*command, "--public-key", public], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert row["request_id"] in done.stdout
    (tmp_path / "proof.json").write_text(proof.replace(f'"{row["tenant_id"]}"', '"somebody"'))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:10]) == (1, "NOT PROVEN")


def test_tenant_sees_its_requests_and_nobody_elses(vllm_market, served):
    row = served.rows(3).iloc[1]
    shown = get(served, f"/market/v1/requests/{row['request_id']}").json()
    assert (shown["output_tokens"], Decimal(shown["charge"])) == (6, row["charge"])
    stranger = vllm_market.tenant("0")
    assert get(stranger, f"/market/v1/requests/{row['request_id']}").status_code == 403
    assert get(served, "/market/v1/requests/req-of-nobody").status_code == 404


def test_usage_in_buckets_as_openai_has_it(served):
    start = int(served.rows(3)["booked_at"].min().timestamp()) - 60
    page = get(served, "/v1/usage", start_time=start, bucket_width="1d", group_by="model").json()
    results = [result for bucket in page["data"] for result in bucket["results"]]
    assert sum(result["output_tokens"] for result in results) == 18
    assert sum(result["num_model_requests"] for result in results) == 3
    assert {result["model"] for result in results} == {"tiny-qwen"}


def test_usage_since_is_usage_from_then_on(vllm_market, served):
    (row,) = vllm_market.cli("usage", "--by", "tenant", "--since", "1h", "--tenant", served.name)
    assert row["requests"] == 3
    assert vllm_market.cli("usage", "--until", "2020-01-01") == []


def test_refund_gives_the_money_back_with_a_reason(vllm_market):
    tenant = vllm_market.tenant()
    tenant.client().chat.completions.create(model="tiny-qwen", messages=HI, max_tokens=5)
    (row,) = tenant.rows(1).to_dict("records")
    asked = ("tenants", "refund", tenant.name, "--request", row["request_id"], "--reason", "bad")
    assert vllm_market.cli(*asked, "--id", "r1")["balance"] == "10"
    assert vllm_market.cli(*asked, "--id", "r1")["created"] is False
    assert "given back" in vllm_market.run(*asked).stderr
    reversal = tenant.rows(2).iloc[-1]
    assert (reversal["kind"], reversal["charge"]) == ("reversal", -row["charge"])
    assert dict(reversal["attrs"])["reason"] == "bad"


@pytest.mark.parametrize("form", ["json", "csv", "html"])
def test_statement_of_a_tenant(vllm_market, served, form):
    month = period(vllm_market)
    done = vllm_market.cli_plain("statement", served.name, "--period", month, "--format", form)
    charged = served.rows(3)["charge"].sum()
    if form == "json":
        statement = json.loads(done)
        assert Decimal(statement["closing"]) == 10 - charged
        assert "compute-market/ledger" in statement["checkpoint"]
    assert served.name in done


def test_statement_of_a_provider_is_its_own(vllm_market, served):
    key = vllm_market.cli("keys", "create", "--provider", "local")["api_key"]
    month = period(vllm_market)
    path = "/market/v1/statements/provider/local"
    assert get(served, path, key, period=month).json()["party"] == "provider"
    assert get(served, path, period=month).status_code == 403


def test_open_month_is_not_settled_but_can_be_looked_at(vllm_market, served):
    month = period(vllm_market)
    shown = vllm_market.cli("settle", "--period", month, "--dry-run")
    assert (shown["settled"], shown["rows"] >= 3) == (False, True)
    refused = vllm_market.run("settle", "--period", month)
    assert refused.returncode == 1
    assert "not over" in refused.stderr


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_focus_export_bills_what_the_ledger_charges(vllm_market, served, tmp_path, suffix):
    file = tmp_path / f"focus.{suffix}"
    month = period(vllm_market)
    vllm_market.cli(*("ledger", "export", str(file), "--period", month, "--tenant", served.name))
    if suffix == "parquet":
        billed = pd.read_parquet(file)["BilledCost"].sum()
    else:
        billed = sum(map(Decimal, pd.read_csv(file, dtype=str)["BilledCost"]))
    assert billed == served.rows(3)["charge"].sum()


def test_read_has_rows_that_are_in_no_file_yet(vllm_market):
    """In a process of its own, as a user would."""
    tenant = vllm_market.tenant()
    tenant.client().chat.completions.create(model="tiny-qwen", messages=HI, max_tokens=5)
    code = (
        "import market.ledger, sys; "
        "t = market.ledger.read(tenant=sys.argv[1]); print(t.num_rows); "
        "print(len(market.ledger.read(tenant=sys.argv[1], form='pandas')))"
    )

    def rows():
        done = subprocess.run(
            [sys.executable, "-c", code, tenant.name],
            env=vllm_market.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split() == ["1", "1"] or None

    wait_until(rows, "the row in read()", timeout_s=30)


def test_metrics_are_for_operators(vllm_market, served):
    operator = (vllm_market.home / "operator.key").read_text().strip()
    page = get(served, "/metrics", operator).text
    assert 'market_tokens_total{kind="output",lane="tokens",model="tiny-qwen"' in page
    assert "market_ledger_lag_seconds" in page
    assert get(served, "/metrics").status_code == 403


def test_new_price_is_for_requests_admitted_later(vllm_market):
    before = vllm_market.cli("prices", "show")
    (card,) = [row for row in before if row["model"] == "tiny-qwen"]
    prices = ("--input", card["input_price"], "--output-price", card["output_price"])
    new = vllm_market.cli("prices", "set", "tiny-qwen", *prices, "--cached", "0.04")
    assert new["price_id"] != card["price_id"]
    tenant = vllm_market.tenant()

    def charged_with_it():
        answer = tenant.client().chat.completions.with_raw_response.create(
            model="tiny-qwen", messages=HI, max_tokens=1
        )
        return answer.headers["x-market-price-id"] == new["price_id"] or None

    wait_until(charged_with_it, "the new price", timeout_s=20)
    cached = card["cached_input_price"]
    vllm_market.cli("prices", "set", "tiny-qwen", *prices, "--cached", cached)
