"""The Ray head node of this machine as a child process that we alone start and end."""

import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from market.errors import MarketFault

NAMESPACE = "market"
ROLE_LABEL = "market.io/role"
NODE_LABEL = "market.io/node"
PROXY_MIDDLEWARES = "serve_apps.proxy.middlewares"
OPERATOR_NODES = {ROLE_LABEL: "operator"}

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
OBJECT_STORE_BYTES = 200 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class HeadNode:
    """A running head node: its supervising process and its address."""

    pid: int
    created_s: float
    address: str
    temp_dir: str

    def is_running(self) -> bool:
        """Whether that very process (not another with its pid) lives."""
        try:
            process = psutil.Process(self.pid)
            alive = process.status() != psutil.STATUS_ZOMBIE
            return alive and abs(process.create_time() - self.created_s) < 1
        except psutil.NoSuchProcess:
            return False


def load_head(state_dir: Path) -> HeadNode | None:
    """The head node started earlier, if it still runs."""
    try:
        facts = json.loads((state_dir / "cluster.json").read_text())
    except FileNotFoundError:
        return None
    head = HeadNode(**facts)
    return head if head.is_running() else None


def start_head(state_dir: Path, logs_dir: Path, cpus: int, gpus: int) -> HeadNode:
    """Start a head node bound to this machine only; returns when it accepts connections.

    Raises MarketFault with the end of its log if it does not come up.
    """
    temp_dir = Path(tempfile.gettempdir()) / f"market-{_short_hash(str(state_dir))}"
    port = free_port()
    logs_dir.mkdir(parents=True, exist_ok=True)
    log_path = logs_dir / "ray.log"
    labels = f"{ROLE_LABEL}=operator,{NODE_LABEL}=local"
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={temp_dir}"),
        *(f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--labels={labels}"),
        *(f"--object-store-memory={OBJECT_STORE_BYTES}", "--include-dashboard=false"),
        *("--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"),
        # Every port is free or random: other clusters may run on this machine.
        *(f"--ray-client-server-port={free_port()}", f"--dashboard-port={free_port()}"),
        *(f"--dashboard-agent-listen-port={free_port()}", "--metrics-export-port=0"),
    ]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=ray_environment(os.environ, state_dir),
        )
    head = HeadNode(
        process.pid, psutil.Process(process.pid).create_time(), f"127.0.0.1:{port}", str(temp_dir)
    )
    _write_private(state_dir / "cluster.json", json.dumps(asdict(head)))
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _raylet_ready(log_path):
        if process.poll() is not None or time.monotonic() > deadline:
            stop_head(head, state_dir)
            tail = log_path.read_text(errors="replace")[-1500:]
            raise MarketFault(f"the Ray head node did not start; end of {log_path}:\n{tail}")
        time.sleep(0.1)
    return head


def ray_environment(environ: Mapping[str, str], state_dir: Path) -> dict[str, str]:
    """Environment of the cluster's processes and of those that connect to it.

    Ray listens on all interfaces and lets anybody run code; a token that only this user can read
    keeps others out.
    """
    token_path = state_dir / "ray.token"
    if not token_path.exists():
        _write_private(token_path, secrets.token_hex(32))
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": PROXY_MIDDLEWARES,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    others = ("RAY_ADDRESS", "RAY_AUTH_TOKEN")
    return {name: value for name, value in environ.items() if name not in others} | ours


def enter_environment(state_dir: Path) -> None:
    """Give this process the cluster's environment; must come before Ray is imported."""
    if "ray" in sys.modules:
        raise RuntimeError("Ray was imported before its environment was set")
    environment = ray_environment(os.environ, state_dir)
    os.environ.clear()
    os.environ.update(environment)


def stop_head(head: HeadNode, state_dir: Path) -> None:
    """End the head node and every process below it, by pid; gently first."""
    if head.is_running():
        supervisor = psutil.Process(head.pid)
        family = [*supervisor.children(recursive=True), supervisor]
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
    (state_dir / "cluster.json").unlink(missing_ok=True)


def free_port() -> int:
    """A TCP port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _raylet_ready(log_path: Path) -> bool:
    return "Ray runtime started" in log_path.read_text(errors="replace")


def _short_hash(text: str) -> str:
    """Socket paths must stay under 107 characters, whatever MARKET_HOME is."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
