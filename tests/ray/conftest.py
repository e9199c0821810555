"""An operator's head with a small HTTP server before it, two provider nodes on this machine."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from market.cluster import node, supervisor

TOKEN = "join-once"
GPUS = [{"index": index, "gpu_type": "h100", "memory_mib": 81_920} for index in range(2)]
SECRETS = {
    "MARKET_API_KEY": "sk-secret",
    "HF_TOKEN": "hf-secret",
    "AWS_SECRET_ACCESS_KEY": "aws-secret",
    "MARKET_DATABASE_URL": "postgresql://u:secret@db/market",
}


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value is not None and value is not False:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {timeout_s} s")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Refused(Exception):
    """What the driver's command raised."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Driver:
    """A process that is connected to the cluster."""

    def __init__(self, state_dir: Path, log_path: Path) -> None:
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.ray.driver", str(state_dir)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def do(self, command: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": command, "with": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the driver ended; see driver.log"
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"], answer["message"])
        return answer["answer"]

    def agent(self, method: str, *arguments: Any) -> Any:
        """Ask a node's agent; the first time it must start, which may take several tries."""

        def asked() -> Any:
            try:
                return {"answer": self.do("ask_agent", method=method, arguments=arguments)}
            except Refused as refused:
                if refused.kind != "Overloaded":
                    raise
                return None

        return wait_until(asked, f"an answer of the agent to {method}")["answer"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Operator:
    """Head, driver and the join endpoint; ``asked`` are the bodies that came."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_dir, self.logs_dir = folder / "operator", folder / "logs"
        self.asked: list[dict[str, Any]] = []
        self.keys: dict[str, str] = {}
        self.is_up = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.start_head()

    def start_head(self) -> None:
        self.head = node.start_head(self.state_dir, self.logs_dir, 8, 0, gpu_indices=[1])
        self.is_up = True
        self.driver = Driver(self.state_dir, self.logs_dir / "driver.log")

    def stop_head(self) -> None:
        self.is_up = False
        self.driver.close()
        node.stop_head(self.head, self.state_dir)
        shutil.rmtree(self.head.temp_dir, ignore_errors=True)

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Living nodes by our id."""
        return {found["node"]: found for found in self.driver.do("nodes") if found["alive"]}

    def admit(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if not self.is_up:
            return 503, {"error": {"message": "the market is starting"}}
        name = body["node"]["name"]
        if "node_key" in body:
            known = self.keys.get(body["node_id"]) == body["node_key"]
        else:
            known = body["join_token"] == f"{TOKEN}-{name}"
            self.keys.setdefault(name, f"key-of-{name}") if known else None
        if not known:
            return 401, {"error": {"message": f"node {name} shows no good key"}}
        return 200, {
            "node_id": name,
            "node_key": self.keys[name],
            "ray_address": self.head.address,
            "ray_token": (self.state_dir / "ray.token").read_text(),
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        operator = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                operator.asked.append(body)
                status, answer = operator.admit(body)
                text = json.dumps(answer).encode()
                self.send_response(status if self.path == supervisor.JOIN_PATH else 404)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_arguments: Any) -> None:
                pass

        return Handler


class Provider:
    """A machine that joins, or what stands for one."""

    def __init__(self, operator: Operator, name: str) -> None:
        self.operator, self.name = operator, name
        self.state_dir = operator.folder / name
        self.logs_dir = operator.folder / f"{name}-logs"
        self.facts = {
            "name": name,
            "provider_id": "acme",
            "gpu_type": "h100",
            "gpus": GPUS,
            "cpu_count": 2,
        }

    def join(self, token: str | None = None) -> str:
        node_id = supervisor.begin_join(
            self.state_dir, self.logs_dir, self.operator.url, token, self.facts
        )
        self.temp_dir = self.worker().temp_dir
        return node_id

    def leave(self) -> bool:
        return supervisor.end_join(self.state_dir)

    def worker(self) -> node.RayNode:
        worker = node.load_worker(self.state_dir)
        assert worker is not None
        return worker

    def raylet(self) -> psutil.Process:
        children = psutil.Process(self.worker().pid).children()
        (raylet,) = [child for child in children if child.name() == "raylet"]
        return raylet

    def supervisor(self) -> psutil.Process:
        return psutil.Process(json.loads((self.state_dir / "supervisor.json").read_text())["pid"])

    def processes(self) -> list[psutil.Process]:
        return node.processes_with({node.RECORD_VARIABLE: str(self.state_dir / "worker.json")})


@pytest.fixture(scope="session")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    running = Operator(tmp_path_factory.mktemp("cluster"))
    yield running
    running.stop_head()
    running.server.shutdown()
    running.server.server_close()
    assert not node.processes_with(
        {node.RECORD_VARIABLE: str(running.state_dir / node.HEAD_RECORD)}
    )


@pytest.fixture(scope="session")
def providers(operator: Operator) -> Iterator[tuple[Provider, Provider]]:
    """Nodes "a" and "b", joined from a shell full of secrets."""
    pair = Provider(operator, "a"), Provider(operator, "b")
    try:
        with pytest.MonkeyPatch.context() as shell, ThreadPoolExecutor(2) as threads:
            for name, value in SECRETS.items():
                shell.setenv(name, value)
            joined = threads.map(lambda p: p.join(f"{TOKEN}-{p.name}"), pair)
            assert list(joined) == ["a", "b"]
        yield pair
    finally:
        for provider in pair:
            provider.leave()
            assert not provider.processes()
            shutil.rmtree(getattr(provider, "temp_dir", ""), ignore_errors=True)


def joined(operator: Operator, provider: Provider) -> Provider:
    """The provider with its node in the cluster, whatever the test before has done to it."""
    provider.join()
    wait_until(lambda: provider.name in operator.nodes(), f"node {provider.name} being in")
    return provider


@pytest.fixture
def node_a(operator: Operator, providers: tuple[Provider, Provider]) -> Provider:
    return joined(operator, providers[0])


@pytest.fixture
def node_b(operator: Operator, providers: tuple[Provider, Provider]) -> Provider:
    return joined(operator, providers[1])
