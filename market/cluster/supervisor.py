"""Keeps a provider's machine in the operator's cluster, whatever happens to either.

A detached process: ask the market how to join, start the Ray node, wait until it is lost, again.
``python -m market.cluster.supervisor STATE_DIR LOGS_DIR`` runs it; ``begin_join`` starts it.
"""

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from market.cluster import node as nodes
from market.cluster.node import (
    KnownProcess,
    RayNode,
    WorkerFacts,
    load_process,
    write_private,
)
from market.errors import (
    Conflict,
    InvalidKey,
    InvalidRequest,
    MarketError,
    MarketFault,
    NotFound,
    Overloaded,
    PermissionDenied,
)

logger = logging.getLogger(__name__)

JOIN_PATH = "/market/v1/nodes"
MEMBERSHIP = "node.json"
SUPERVISOR = "supervisor.json"
LOG = "supervisor.log"

ASK_TIMEOUT_S = 30.0
JOIN_TIMEOUT_S = 150.0
END_TIMEOUT_S = nodes.STOP_TIMEOUT_S + 4 * nodes.LEFTOVER_TIMEOUT_S
WATCH_S = 1.0
CONNECT_TIMEOUT_S = 1.0
OPERATOR_GONE_S = 5.0
PAUSE_MIN_S = 1.0
PAUSE_MAX_S = 15.0
STEADY_S = 60.0

_ERRORS: dict[int, type[MarketError]] = {
    400: InvalidRequest,
    401: InvalidKey,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    410: NotFound,
    422: InvalidRequest,
    503: Overloaded,
}
FINAL = (InvalidKey, PermissionDenied, NotFound)


@dataclass(frozen=True, slots=True)
class Membership:
    """What this machine remembers of its join: which market, as what, and what proves it.

    ``node`` is what the market is told of the machine; of that we read provider_id, gpu_type, gpus
    (index, memory_mib) and cpu_count ourselves.
    """

    market_url: str
    node: Mapping[str, Any]
    join_token: str | None = field(default=None, repr=False)
    node_id: str | None = None
    node_key: str | None = field(default=None, repr=False)

    def body(self) -> dict[str, Any]:
        """What the market is asked with: the key, or before there is one the token."""
        if self.node_key is not None:
            return {"node_id": self.node_id, "node_key": self.node_key, "node": self.node}
        return {"join_token": self.join_token, "node": self.node}

    def admitted(self, admission: "Admission") -> "Membership":
        """With the key that the market gave; the token has done its work."""
        return replace(
            self, join_token=None, node_id=admission.node_id, node_key=admission.node_key
        )


@dataclass(frozen=True, slots=True)
class Admission:
    """The market's answer: our key, and the way into the cluster as it is now."""

    node_id: str
    node_key: str = field(repr=False)
    ray_address: str
    ray_token: str = field(repr=False)


# For looking at facts before there is an answer.
NOWHERE = Admission("nobody", "", "", "")


def admission_of(answer: object) -> Admission:
    """The admission in a JSON answer. Raises MarketFault if it is not one."""
    fields = answer if isinstance(answer, dict) else {}
    values = {name: fields.get(name) for name in Admission.__dataclass_fields__}
    wrong = [name for name, value in values.items() if not isinstance(value, str) or not value]
    if wrong:
        raise MarketFault(f"the market's answer to the join has no {' and no '.join(wrong)}")
    return Admission(**values)  # type: ignore[arg-type]  # checked above


def worker_facts(admission: Admission, node: Mapping[str, Any]) -> WorkerFacts:
    """What Ray is started with. Raises InvalidRequest if the machine's facts are incomplete."""
    try:
        gpus = node["gpus"]
        return WorkerFacts(
            provider_id=str(node["provider_id"]),
            node_id=admission.node_id,
            gpu_type=str(node["gpu_type"]),
            gpu_memory_mib=min((int(gpu["memory_mib"]) for gpu in gpus), default=0),
            gpu_indices=tuple(int(gpu["index"]) for gpu in gpus),
            cpu_count=int(node["cpu_count"]),
            ray_address=admission.ray_address,
            ray_token=admission.ray_token,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"the facts about this node are incomplete: {error!r}") from error


def error_of(status: int, text: str) -> MarketError:
    """What an answer that is no success means.

    Only the market's own word is taken for final: a proxy in front of a market that is just
    starting says 404 as well.
    """
    try:
        message = str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return MarketError(f"HTTP {status}: {text[:200]}")
    return _ERRORS.get(status, MarketError)(message)


def next_pause_s(pause_s: float, ran_s: float) -> float:
    """Seconds before the next try: twice the last pause, or the shortest after a long run."""
    return PAUSE_MIN_S if ran_s >= STEADY_S else min(PAUSE_MAX_S, max(PAUSE_MIN_S, 2 * pause_s))


def load_membership(state_dir: Path) -> Membership | None:
    """What ``begin_join`` or an administrator wrote down, if anything."""
    try:
        return Membership(**json.loads((state_dir / MEMBERSHIP).read_text()))
    except FileNotFoundError:
        return None


def begin_join(
    state_dir: Path,
    logs_dir: Path,
    market_url: str,
    join_token: str | None,
    node_facts: Mapping[str, Any],
) -> str:
    """Join this machine to a market for good; returns its node id once the cluster has it.

    ``node_facts`` is what the market is told (see ``Membership``). Again with the same facts is
    harmless; a machine that was in the market before needs no token. Raises the market's refusal,
    Conflict if the machine is in another market or with other facts, InvalidRequest without a
    token where one is needed, MarketFault with the end of the log if Ray does not get in.
    """
    state_dir, logs_dir = state_dir.resolve(), logs_dir.resolve()
    wanted = Membership(market_url.rstrip("/"), json.loads(json.dumps(node_facts)), join_token)
    worker_facts(NOWHERE, wanted.node)  # before a token is spent
    state_dir.mkdir(parents=True, exist_ok=True)
    with _locked(state_dir / "join.lock"):
        known, supervisor = load_membership(state_dir), _load_supervisor(state_dir)
        if supervisor is not None and known is not None:
            _require_same(known, wanted)
            return _wait_until_accepted(state_dir, logs_dir, supervisor.is_running)
        if known is None or (known.market_url, known.node) != (wanted.market_url, wanted.node):
            nodes.stop_worker(state_dir)
        _save(state_dir, _admit(known, wanted))
        process = _start_supervisor(state_dir, logs_dir)
        try:
            return _wait_until_accepted(state_dir, logs_dir, lambda: process.poll() is None)
        except BaseException:
            end_join(state_dir)
            raise


def end_join(state_dir: Path) -> bool:
    """Take this machine out of the cluster: no process is left. False if it was not in.

    The membership stays on record: ``begin_join`` brings the node back without a token.
    """
    state_dir = state_dir.resolve()
    supervisor = _load_supervisor(state_dir)
    if supervisor is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(supervisor.pid)
            process.terminate()
            psutil.wait_procs([process], timeout=END_TIMEOUT_S)
            nodes.end_processes([process], patience_s=0)
    left = nodes.stop_worker(state_dir)
    (state_dir / SUPERVISOR).unlink(missing_ok=True)
    return supervisor is not None or left


def supervise(state_dir: Path, logs_dir: Path) -> None:
    """Keep the node in the cluster until the market refuses it for good."""
    pause_s = 0.0
    said = ""
    while True:
        began_s = time.monotonic()
        try:
            node = nodes.load_worker(state_dir) or _start(state_dir, logs_dir)
            logger.info("the node is in the cluster at %s", node.address)
            problem = _watch(node)
            said = ""
        except FINAL as refusal:
            logger.error("the market refuses this node: %s", refusal)
            return
        except (MarketError, OSError) as error:
            problem = str(error)
        if problem != said:
            logger.warning("%s; trying again", problem)
            said = problem
        nodes.stop_worker(state_dir)
        pause_s = next_pause_s(pause_s, time.monotonic() - began_s)
        time.sleep(pause_s)


def _start(state_dir: Path, logs_dir: Path) -> RayNode:
    member = load_membership(state_dir)
    if member is None:
        raise NotFound(f"{state_dir / MEMBERSHIP} is gone")
    admission = _ask(member)
    if member.admitted(admission) != member:
        _save(state_dir, member.admitted(admission))
    if _refuses(admission.ray_address):  # Ray itself would try for a minute
        raise Overloaded(f"the operator's cluster at {admission.ray_address} does not listen")
    return nodes.start_worker(state_dir, logs_dir, worker_facts(admission, member.node))


def _watch(node: RayNode) -> str:
    """Wait until the node is lost; returns how."""
    reached_s = time.monotonic()
    while node.is_running() and node.has_raylet():
        if not _refuses(node.address):
            reached_s = time.monotonic()
        elif time.monotonic() - reached_s > OPERATOR_GONE_S:
            # Ray would go on for a minute; an operator that returns has another address.
            return f"the operator's cluster at {node.address} is gone"
        time.sleep(WATCH_S)
    return "the node's Ray ended"


def _refuses(address: str) -> bool:
    """Whether nobody listens there; silence may be the network's fault and is left to Ray."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _ask(member: Membership) -> Admission:
    """Ask the market for the way in. Raises its refusal, or MarketError if nobody answers."""
    url = f"{member.market_url}{JOIN_PATH}"
    try:
        answer = httpx.post(url, json=member.body(), timeout=ASK_TIMEOUT_S)
    except httpx.TransportError as error:
        raise MarketError(
            f"no market answers at {member.market_url} ({type(error).__name__})"
        ) from None
    if not answer.is_success:
        raise error_of(answer.status_code, answer.text)
    try:
        return admission_of(answer.json())
    except ValueError:
        raise MarketFault(f"{url} answers, but not as a market") from None


def _admit(known: Membership | None, wanted: Membership) -> Membership:
    """The membership with a key that works now: that of before, or one for the token."""
    if known is not None and known.node_key and known.market_url == wanted.market_url:
        before = replace(known, node=wanted.node)
        try:
            return before.admitted(_ask(before))
        except FINAL:
            if wanted.join_token is None:
                raise
    if wanted.join_token is None:
        raise InvalidRequest(
            f"this machine was never in the market at {wanted.market_url}: a join token is needed",
            param="join_token",
        )
    return wanted.admitted(_ask(wanted))


def _require_same(known: Membership, wanted: Membership) -> None:
    if known.market_url != wanted.market_url:
        raise Conflict(f"this machine is in the market at {known.market_url}; leave that first")
    if known.node != wanted.node:
        raise Conflict(f"node {known.node_id} is in the market with other facts; leave first")


def _wait_until_accepted(state_dir: Path, logs_dir: Path, lives: Callable[[], bool]) -> str:
    """The node's id, once Ray has taken it in. Raises MarketFault with the log's end."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while lives() and time.monotonic() < deadline:
        node, member = nodes.load_worker(state_dir), load_membership(state_dir)
        if node is not None and node.is_accepted() and node.has_raylet():
            assert member is not None
            assert member.node_id is not None, "accepted without an id"
            return member.node_id
        time.sleep(0.1)
    log_path = logs_dir / LOG
    tail = log_path.read_text(errors="replace")[-1500:] if log_path.exists() else ""
    raise MarketFault(f"this machine did not get into the cluster; end of {log_path}:\n{tail}")


def _start_supervisor(state_dir: Path, logs_dir: Path) -> "subprocess.Popen[bytes]":
    logs_dir.mkdir(parents=True, exist_ok=True)
    with (logs_dir / LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "market.cluster.supervisor", str(state_dir), str(logs_dir)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=nodes.worker_environment(os.environ, state_dir / "worker.token"),
        )
    _note_supervisor(state_dir, process.pid)  # so that it can be ended from now on
    return process


def _load_supervisor(state_dir: Path) -> KnownProcess | None:
    return load_process(KnownProcess, state_dir / SUPERVISOR)


def _note_supervisor(state_dir: Path, pid: int) -> None:
    known = KnownProcess(pid, psutil.Process(pid).create_time())
    write_private(state_dir / SUPERVISOR, json.dumps(asdict(known)))


def _save(state_dir: Path, member: Membership) -> None:
    write_private(state_dir / MEMBERSHIP, json.dumps(asdict(member), indent=1))


@contextlib.contextmanager
def _locked(path: Path, flags: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the lock of a file. Raises BlockingIOError with LOCK_NB if somebody has it."""
    with path.open("w") as file:
        fcntl.flock(file, flags)
        yield


def _leave(_signal: int, _frame: object) -> None:
    raise SystemExit(0)


def main() -> None:
    """Run the supervisor of the folder named on the command line until SIGTERM."""
    state_dir, logs_dir = (Path(argument).resolve() for argument in sys.argv[1:3])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _leave)
    try:
        with _locked(state_dir / "supervisor.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
            _note_supervisor(state_dir, os.getpid())
            try:
                supervise(state_dir, logs_dir)
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                nodes.stop_worker(state_dir)
                (state_dir / SUPERVISOR).unlink(missing_ok=True)
    except BlockingIOError:
        raise SystemExit(f"another supervisor keeps the node of {state_dir}") from None


if __name__ == "__main__":
    main()
