#!/usr/bin/env python3
"""Ask a model over HTTP, wait for the ledger's seal, show row, charge and balance with pandas."""

import json
import sys
import time
from decimal import Decimal

import httpx
import pandas as pd

from market.config import Config

SEAL_TIMEOUT_S = 30


def ask(config: Config, model: str, question: str) -> tuple[str, dict[str, object]]:
    """Stream an answer to the terminal; returns (request id, usage object)."""
    headers = {"authorization": f"Bearer {config.chat_key_file.read_text().strip()}"}
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 120,
        "temperature": 0,
    }
    usage: dict[str, object] = {}
    print(f"> {question}\n", flush=True)
    url = f"{config.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=300) as answer:
        if not answer.is_success:
            sys.exit(f"HTTP {answer.status_code}: {answer.read().decode()}")
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                sys.exit(f"the answer broke off: {chunk['error']['message']}")
            for choice in chunk["choices"]:
                print(choice["delta"].get("content", ""), end="", flush=True)
            usage = chunk["usage"] or usage
        return answer.headers["x-request-id"], usage


def sealed_row(config: Config, request_id: str) -> "pd.Series[object]":
    """The request's row, as soon as it and the transfer that pays for it are in Parquet."""
    deadline = time.monotonic() + SEAL_TIMEOUT_S
    while time.monotonic() < deadline:
        ledger = pd.read_parquet(config.ledger_dir / "usage")
        transfers = pd.read_parquet(config.ledger_dir / "transfers")
        mine = ledger[ledger["request_id"] == request_id]
        if len(mine):
            lsn = mine.iloc[0]["lsn"]
            paid = (transfers["lsn_lo"] <= lsn) & (lsn <= transfers["lsn_hi"])
            if paid.any():
                return mine.iloc[0]
        time.sleep(0.2)
    sys.exit(f"{request_id} was not sealed within {SEAL_TIMEOUT_S} s")


def balance(config: Config, tenant: str) -> Decimal:
    """Credits less debits of the tenant's account, from the transfers ledger."""
    transfers = pd.read_parquet(config.ledger_dir / "transfers")
    account = f"tenant:{tenant}"
    credits = transfers.loc[transfers["credit_account"] == account, "amount"].sum()
    debits = transfers.loc[transfers["debit_account"] == account, "amount"].sum()
    return Decimal(credits) - Decimal(debits)


def main() -> None:
    """Arguments: model, tenant, question."""
    model, tenant, question = sys.argv[1:]
    config = Config.from_env()
    request_id, usage = ask(config, model, question)
    print(f"\n\nHTTP says      {usage}", flush=True)
    row = sealed_row(config, request_id)
    print("\npandas says")
    shown = (
        *("request_id", "tenant_id", "model", "lane", "provider_id", "input_tokens"),
        *("output_tokens", "finish_reason", "price_id", "charge", "currency"),
    )
    print(row[list(shown)].to_string())
    print(f"\nnew balance of {tenant}: {balance(config, tenant)} {row['currency']}")


if __name__ == "__main__":
    main()
