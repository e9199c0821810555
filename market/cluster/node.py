"""Ray nodes of this machine as child processes that we alone start, find again and end.

The operator's head, and the nodes that a provider adds to it; several fit on one machine.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

from market.errors import InvalidRequest, MarketFault

NAMESPACE = "market"
ROLE_LABEL = "market.io/role"
NODE_LABEL = "market.io/node"
PROVIDER_LABEL = "market.io/provider"
GPU_TYPE_LABEL = "market.io/gpu-type"
GPU_MEMORY_LABEL = "market.io/gpu-memory-mib"
OPERATOR_NODES = {ROLE_LABEL: "operator"}
LOCAL = "local"

# Where a node's pid is written down. Operator and provider may share a folder.
HEAD_RECORD = "cluster.json"
WORKER_RECORD = "worker.json"
# In the environment of every process of a node, so that those that left its tree are found too.
NODE_VARIABLE = "MARKET_NODE"
RECORD_VARIABLE = "MARKET_NODE_RECORD"

# Below those that kernels give to connections: none is taken between its choice and its use.
PORTS, PORTS_TRIED = range(20_000, 32_000), 200
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
LEFTOVER_TIMEOUT_S = 5
OBJECT_STORE_BYTES = 200 * 1024 * 1024
# CPUs are no limit here: places are given by GPU, and a small machine still runs our services.
LOGICAL_CPUS_MIN = 8
# Ray's own defaults notice a dead raylet after 14 s and a machine that is gone after a minute.
HEAD_SETTINGS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}

# A provider's node runs models of others: nothing but this goes into its environment.
_PASSED_ON = re.compile(
    "PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_.*|TZ|TMPDIR|PYTHONPATH|VIRTUAL_ENV"
    "|LD_LIBRARY_PATH|XDG_CACHE_HOME|SSL_CERT_.*|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
    "|HTTPS?_PROXY|https?_proxy|NO_PROXY|no_proxy"
    "|(CUDA|NVIDIA|NCCL|GLOO|OMP|TORCH|PYTORCH|HF|TRANSFORMERS|VLLM)_.*"
)
_SECRET_NAME = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/\s]*@")
_LABEL = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?")


@dataclass(frozen=True, slots=True)
class KnownProcess:
    """A process that can be told from a later one with its pid."""

    pid: int
    created_s: float

    def is_running(self) -> bool:
        """Whether that very process lives."""
        try:
            process = psutil.Process(self.pid)
            alive = process.status() != psutil.STATUS_ZOMBIE
            return alive and abs(process.create_time() - self.created_s) < 1
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True, slots=True)
class RayNode(KnownProcess):
    """A running node: its ``ray start`` process and the address of the cluster's head."""

    address: str
    temp_dir: str
    log_path: str = ""

    def is_accepted(self) -> bool:
        """Whether the cluster has taken it in."""
        try:
            return "Ray runtime started" in Path(self.log_path).read_text(errors="replace")
        except OSError:
            return False

    def has_raylet(self) -> bool:
        """Whether its raylet lives: ``ray start`` goes on when that has ended without an error."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return any(
                child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE
                for child in psutil.Process(self.pid).children()
            )
        return False


HeadNode = RayNode
Known = TypeVar("Known", bound=KnownProcess)


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a provider's node is started with; ``ray_token`` admits it to the cluster."""

    provider_id: str
    node_id: str
    gpu_type: str
    gpu_memory_mib: int
    gpu_indices: tuple[int, ...]
    cpu_count: int
    ray_address: str
    ray_token: str = field(repr=False)


def slot_resource(node_id: str, index: int) -> str:
    """Ray's name for one physical GPU: there is 1 of it, and replicas take shares of it."""
    return f"gpu-slot/{node_id}/{index}"


def slots(node_id: str, gpu_indices: Iterable[int]) -> dict[str, int]:
    """The custom resources of a node."""
    return {slot_resource(node_id, index): 1 for index in gpu_indices}


def load_head(state_dir: Path) -> RayNode | None:
    """The head node started earlier, if it still runs."""
    return load_process(RayNode, state_dir / HEAD_RECORD)


def load_worker(state_dir: Path) -> RayNode | None:
    """The provider's node started earlier from this folder, if it still runs."""
    return load_process(RayNode, state_dir / WORKER_RECORD)


def start_head(
    state_dir: Path, logs_dir: Path, cpus: int, gpus: int, gpu_indices: Sequence[int] | None = None
) -> RayNode:
    """Start a head node; returns when it accepts connections (Ray listens on all interfaces).

    It has a slot for each of ``gpu_indices`` (the first ``gpus``, if they are not given). Raises
    MarketFault with the end of its log if it does not come up.
    """
    address = f"127.0.0.1:{free_port()}"
    indices = range(gpus) if gpu_indices is None else gpu_indices
    options = [
        *("--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"),
        *(f"--ray-client-server-port={free_port()}", f"--dashboard-port={free_port()}"),
        *("--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", f"--num-gpus={gpus}"),
        f"--labels={ROLE_LABEL}=operator,{NODE_LABEL}={LOCAL}",
        f"--resources={json.dumps(slots(LOCAL, indices))}",
    ]
    environment = ray_environment(os.environ, state_dir) | HEAD_SETTINGS | {NODE_VARIABLE: LOCAL}
    return _start(state_dir / HEAD_RECORD, logs_dir / "ray.log", address, options, environment)


def start_worker(state_dir: Path, logs_dir: Path, facts: WorkerFacts) -> RayNode:
    """Start a provider's node; returns when the operator's cluster has taken it in.

    What was left of an earlier node of this folder is ended first. Raises InvalidRequest if an id
    cannot be a label, MarketFault with the end of its log if it does not come up.
    """
    stop_worker(state_dir)
    token_path = state_dir / "worker.token"
    write_private(token_path, facts.ray_token)
    options = [
        *(f"--address={facts.ray_address}", f"--node-ip-address={node_ip(facts.ray_address)}"),
        *(f"--num-cpus={max(LOGICAL_CPUS_MIN, facts.cpu_count)}", "--num-gpus=0"),
        "--include-log-monitor=false",  # nobody reads our replicas' logs from afar
        f"--labels={worker_labels(facts)}",
        f"--resources={json.dumps(slots(facts.node_id, facts.gpu_indices))}",
    ]
    environment = worker_environment(os.environ, token_path) | {NODE_VARIABLE: facts.node_id}
    record, log_path = state_dir / WORKER_RECORD, logs_dir / "worker.log"
    return _start(record, log_path, facts.ray_address, options, environment)


def worker_labels(facts: WorkerFacts) -> str:
    """Labels in the form of ``ray start``. Raises InvalidRequest if an id cannot be one."""
    for what, value in (("node", facts.node_id), ("provider", facts.provider_id)):
        if not _LABEL.fullmatch(value):
            raise InvalidRequest(
                f"{what} id {value!r}: use letters, digits, '-', '_' and '.', at most 63, with a "
                "letter or digit at both ends"
            )
    gpu_type = re.sub(r"[^a-zA-Z0-9_.-]", "-", facts.gpu_type)[:63].strip("_.-")
    labels = {
        ROLE_LABEL: "provider",
        PROVIDER_LABEL: facts.provider_id,
        NODE_LABEL: facts.node_id,
        GPU_TYPE_LABEL: gpu_type or "unknown",
        GPU_MEMORY_LABEL: str(facts.gpu_memory_mib),
    }
    return ",".join(f"{name}={value}" for name, value in labels.items())


def _start(
    record: Path,
    log_path: Path,
    address: str,
    options: Sequence[str],
    environment: Mapping[str, str],
) -> RayNode:
    temp_dir = Path(tempfile.gettempdir()) / f"market-{_short_hash(str(record))}"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options),
        *(f"--temp-dir={temp_dir}", f"--object-store-memory={OBJECT_STORE_BYTES}"),
        # Every port is free or random: other nodes and clusters may run on this machine.
        *("--min-worker-port=0", "--max-worker-port=0", "--metrics-export-port=0"),
        *("--dashboard-agent-listen-port=0", "--disable-usage-stats"),
    ]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**environment, RECORD_VARIABLE: str(record)},
        )
    created_s = psutil.Process(process.pid).create_time()
    node = RayNode(process.pid, created_s, address, str(temp_dir), str(log_path))
    write_private(record, json.dumps(asdict(node)))
    deadline = time.monotonic() + START_TIMEOUT_S
    while not node.is_accepted():
        if process.poll() is not None or time.monotonic() > deadline:
            _stop(node, record)
            tail = log_path.read_text(errors="replace")[-1500:]
            raise MarketFault(f"the Ray node did not start; end of {log_path}:\n{tail}")
        time.sleep(0.1)
    return node


def ray_environment(environ: Mapping[str, str], state_dir: Path) -> dict[str, str]:
    """Environment of the cluster's processes and of those that connect to it.

    Ray listens on all interfaces and lets anybody run code; a token that only this user can read
    keeps others out.
    """
    token_path = state_dir / "ray.token"
    if not token_path.exists():
        write_private(token_path, secrets.token_hex(32))
    others = ("RAY_ADDRESS", "RAY_AUTH_TOKEN")
    return {name: value for name, value in environ.items() if name not in others} | (
        _ray_settings(token_path)
    )


def worker_environment(environ: Mapping[str, str], token_path: Path) -> dict[str, str]:
    """Environment of a provider's node: what models need of ours, and no secret.

    A process there sees a GPU only if its replica was given one.
    """
    passed_on = {
        name: value
        for name, value in environ.items()
        if _PASSED_ON.fullmatch(name)
        and not _SECRET_NAME.search(name)
        and not _SECRET_VALUE.search(value)
    }
    return passed_on | _ray_settings(token_path) | {"CUDA_VISIBLE_DEVICES": ""}


def _ray_settings(token_path: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # What we run is pinned to its node, so a node that ends would wait in vain for it to move.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # Ray and vLLM write titles over their command line; not over their environment, please.
        "SPT_NOENV": "1",
        # Ten looks a second cost an idle market a twentieth of a core; five are soon enough.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.2",
        # Gateways and replicas are services, not batch jobs: Ray would run them at niceness 15.
        "RAY_worker_niceness": "0",
    }


def enter_environment(state_dir: Path) -> None:
    """Give this process the cluster's environment; must come before Ray is imported."""
    if "ray" in sys.modules:
        raise RuntimeError("Ray was imported before its environment was set")
    environment = ray_environment(os.environ, state_dir)
    os.environ.clear()
    os.environ.update(environment)


def stop_head(head: RayNode, state_dir: Path) -> None:
    """End the head node and every process that it left, by pid; gently first."""
    _stop(head, state_dir / HEAD_RECORD)


def stop_worker(state_dir: Path) -> bool:
    """End the provider's node of this folder and every process that it left; gently first.

    False if there was none.
    """
    return _stop(load_worker(state_dir), state_dir / WORKER_RECORD)


def _stop(node: RayNode | None, record: Path) -> bool:
    family: list[psutil.Process] = []
    if node is not None and node.is_running():
        with contextlib.suppress(psutil.NoSuchProcess):
            starter = psutil.Process(node.pid)
            family = [starter, *starter.children(recursive=True)]
            starter.terminate()
            psutil.wait_procs([starter], timeout=STOP_TIMEOUT_S)
    # Ray's agents outlive a raylet that was killed, and engines may have left the tree.
    family += processes_with({RECORD_VARIABLE: str(record)})
    end_processes(family, LEFTOVER_TIMEOUT_S)
    record.unlink(missing_ok=True)
    return bool(family)


def environments() -> Iterator[tuple[psutil.Process, Mapping[str, str]]]:
    """This user's other processes with the environment they were started in."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.pid != os.getpid() and process.uids().real == os.getuid():
                yield process, process.environ()


def processes_with(variables: Mapping[str, str]) -> list[psutil.Process]:
    """This user's other processes that were started with these environment variables."""
    return [process for process, environ in environments() if variables.items() <= environ.items()]


def end_processes(processes: Sequence[psutil.Process], patience_s: float) -> list[psutil.Process]:
    """SIGTERM, and SIGKILL for those that have not ended in time; returns what lives on."""
    alive = list(processes)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                end(process)
        wait_s = patience_s if end is psutil.Process.terminate else LEFTOVER_TIMEOUT_S
        _, alive = psutil.wait_procs(alive, timeout=wait_s)
    return alive


def node_ip(address: str) -> str:
    """The address under which a node on this machine is known to the cluster at ``host:port``."""
    host = address.rpartition(":")[0].strip("[]")
    if host in ("127.0.0.1", "localhost", "::1"):
        return "127.0.0.1"
    try:
        family = socket.getaddrinfo(host, None)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 1))  # chooses a route; nothing is sent
            return str(probe.getsockname()[0])
    except OSError as error:
        raise MarketFault(f"no way from here to the cluster at {address}: {error}") from error


def free_port() -> int:
    """A TCP port nobody listens on, nor will unasked. Raises MarketFault if none is left."""
    for port in random.sample(PORTS, PORTS_TRIED):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise MarketFault(f"no free port from {PORTS[0]} to {PORTS[-1]}; end what listens there")


def load_process(kind: type[Known], path: Path) -> Known | None:
    """The process written down there, if it still runs."""
    try:
        process = kind(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    return process if process.is_running() else None


def _short_hash(text: str) -> str:
    """Socket paths must stay under 107 characters, whatever MARKET_HOME is."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write_private(path: Path, text: str) -> None:
    """Write a whole file or nothing, for its owner's eyes only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        file.write(text)
    part.replace(path)
