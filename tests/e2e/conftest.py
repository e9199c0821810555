"""A whole market, started and stopped by the CLI as a user would."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import openai
import pandas as pd
import psutil
import pytest

from tests.models import tiny_embed, tiny_model

__all__ = ["tiny_embed", "tiny_model"]

COMMAND = Path(sys.executable).parent / "market"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value is not None and value is not False:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {timeout_s} s")


class Market:
    """Runs ``market`` commands on its own home and port, and looks at what they left."""

    def __init__(self, home: Path, model: Path, url: str = "", **settings: str) -> None:
        self.home = home
        self.url = url or f"http://127.0.0.1:{free_port()}"
        self.model = model
        (home / "models").mkdir(parents=True)
        (home / "models" / "tiny-qwen").symlink_to(model)
        self._tenants = 0
        self._settings = settings

    def environment(self) -> dict[str, str]:
        ours = {"MARKET_HOME": str(self.home), "MARKET_URL": self.url, **self._settings}
        return {k: v for k, v in os.environ.items() if k != "MARKET_API_KEY"} | ours

    def join(self, name: str, provider: str, *more: str) -> "Market":
        """A node of its own home on this machine, in the cluster when this returns."""
        self.cli("providers", "create", provider)
        token = self.cli("providers", "token", provider)["join_token"]
        node = Market(self.home.parent / name, self.model, self.url)
        options = ("--node", name, "--provider", provider, "--token", token, *more)
        node.cli("join", self.url, *options)
        wait_until(lambda: self.offer(name)["state"] == "open", f"node {name}")
        return node

    def offer(self, name: str) -> dict[str, Any]:
        return next(offer for offer in self.get("/offers") if offer["offer_id"] == name)

    def lease(self, lease_id: str) -> dict[str, Any]:
        return self.get(f"/leases/{lease_id}")

    def run(self, *arguments: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = self.environment() | ({"MARKET_API_KEY": key} if key else {})
        return subprocess.run(
            [str(COMMAND), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def cli(self, *arguments: str) -> Any:
        done = self.run(*arguments, "--output", "json")
        assert done.returncode == 0, f"market {' '.join(arguments)}: {done.stderr[-3000:]}"
        return json.loads(done.stdout)

    def cli_plain(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, f"market {' '.join(arguments)}: {done.stderr[-3000:]}"
        return done.stdout

    def tenant(self, deposit: str = "10") -> "Tenant":
        """A new one with money and a key, made over HTTP: commands take their time to start."""
        self._tenants += 1
        name = f"tenant-{self._tenants}"
        self.post("/tenants", tenant_id=name)
        if deposit != "0":
            self.post(f"/tenants/{name}/deposits", amount=deposit, deposit_id=f"first-{name}")
        return Tenant(self, name, self.post("/keys", tenant_id=name)["api_key"])

    def status(self) -> dict[str, Any]:
        return self.get("/status")

    def get(self, path: str) -> Any:
        return self._ask("GET", path, None)

    def post(self, path: str, **body: Any) -> Any:
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        key = (self.home / "operator.key").read_text().strip()
        headers = {"authorization": f"Bearer {key}"}
        url = f"{self.url}/market/v1{path}"
        # A gateway that was killed is back within seconds.
        with httpx.Client(transport=httpx.HTTPTransport(retries=6), timeout=90) as client:
            answer = client.request(method, url, json=body, headers=headers)
        answer.raise_for_status()
        return answer.json()

    def ledger(self, dataset: str = "usage") -> pd.DataFrame:
        return pd.read_parquet(self.home / "ledger" / dataset)

    def head(self) -> psutil.Process:
        return psutil.Process(json.loads((self.home / "state" / "cluster.json").read_text())["pid"])

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes of this market whose title contains ``title``."""
        found = []
        for process in self.head().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(title in part for part in process.cmdline()):
                    found.append(process)
        return found


class Tenant:
    """A tenant with a key, and the OpenAI clients it would use."""

    def __init__(self, market: Market, name: str, key: str) -> None:
        self.market, self.name, self.key = market, name, key
        self.base_url = f"{market.url}/v1"

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"max_retries": 0, "timeout": 200} | options
        return openai.OpenAI(base_url=self.base_url, api_key=self.key, **options)

    def async_client(self) -> openai.AsyncOpenAI:
        limits = httpx.Limits(max_connections=200)
        return openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.key,
            max_retries=0,
            timeout=200,
            # Without certificates: reading them takes longer than many an answer.
            http_client=httpx.AsyncClient(limits=limits, timeout=200, verify=False),
        )

    def balance(self) -> dict[str, str]:
        return self.market.get(f"/tenants/{self.name}")

    def settled(self) -> Decimal:
        """The balance once nothing is held any more: gateways return what they do not need."""

        def free() -> dict[str, str] | None:
            balance = self.balance()
            return balance if balance["held"] == "0" else None

        return Decimal(wait_until(free, f"{self.name} has nothing on hold")["balance"])

    def rows(self, count: int, timeout_s: float = 60) -> pd.DataFrame:
        """This tenant's usage rows, once ``count`` of them are sealed."""

        def sealed() -> pd.DataFrame | None:
            ledger = self.market.ledger()
            mine = ledger[ledger["tenant_id"] == self.name]
            return mine if len(mine) >= count else None

        rows = wait_until(sealed, f"{count} rows of {self.name}", timeout_s)
        assert len(rows) == count
        return rows

    def transfers_balance(self) -> Any:
        transfers = self.market.ledger("transfers")
        account = f"tenant:{self.name}"
        paid_in = transfers.loc[transfers["credit_account"] == account, "amount"].sum()
        return paid_in - transfers.loc[transfers["debit_account"] == account, "amount"].sum()


@contextlib.contextmanager
def running_market(home: Path, model: Path, **settings: str) -> Iterator[Market]:
    market = Market(home, model, **settings)
    market.cli("up")
    family = [market.head(), *market.head().children(recursive=True)]
    try:
        yield market
    finally:
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            family += market.head().children(recursive=True)
        market.cli("down")
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
        assert not alive, f"left behind: {alive}"


@pytest.fixture(scope="session")
def vllm_market(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Market]:
    """One market with the tiny model on vLLM, shared by the tests."""
    with running_market(tmp_path_factory.mktemp("vllm-market"), tiny_model) as market:
        market.cli("deploy", "tiny-qwen", "--mode", "tokens", "--engine", "vllm")
        yield market


@pytest.fixture
def tenant(vllm_market: Market) -> Tenant:
    return vllm_market.tenant()
