"""The node agent: what engines run on a node, ending them for good, its GPUs' memory, its models.

One detached Ray actor per node. Every engine carries its replica's id in its environment, and its
children inherit it, so that processes are found even after their parents died.
"""

import logging
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from market.catalog import Model
from market.cluster import hardware
from market.cluster.actors import stop_service
from market.cluster.models import ModelStore
from market.cluster.node import (
    NAMESPACE,
    NODE_LABEL,
    NODE_VARIABLE,
    RECORD_VARIABLE,
    end_processes,
    environments,
    processes_with,
)
from market.errors import Conflict, MarketError, MarketFault, NotFound, Overloaded
from market.types import StoredModel, StoredState

logger = logging.getLogger(__name__)

REPLICA_VARIABLE = "MARKET_REPLICA"
ANSWER_TIMEOUT_S = 5.0
KILL_TIMEOUT_S = 10.0
REMOVE_TIMEOUT_S = 60.0
KILL_ROUNDS = 3
THREADS = 8
# What drivers and other contexts may take of a card that counts as free.
TOLERANCE_MILLI = 30


def agent_name(node_id: str) -> str:
    """Name of the node's agent among Ray's actors."""
    return f"node-agent-{node_id}"


def memory_is_free(used_mib: int, total_mib: int, others_milli: int) -> bool:
    """Whether a GPU's memory is free apart from what shares of other replicas may use.

    ``others_milli`` is the sum of their shares in thousandths; 3 % of the card are tolerated.
    """
    return used_mib * 1000 <= total_mib * (others_milli + TOLERANCE_MILLI)


def by_replica(
    processes: Iterable[tuple[int, Mapping[str, str]]], marks: Mapping[str, str]
) -> dict[str, list[int]]:
    """Sorted pids by replica, of (pid, environment) with a replica's id and all of the marks."""
    found: dict[str, list[int]] = {}
    for pid, environment in sorted(processes, key=lambda process: process[0]):
        replica_id = environment.get(REPLICA_VARIABLE)
        if replica_id and marks.items() <= environment.items():
            found.setdefault(replica_id, []).append(pid)
    return found


def marks_of(node_id: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What the environment of this node's processes has in common.

    The name alone would do, but other markets of this user on this machine may use it as well;
    the record file is ours alone. A node that was not started by us has none.
    """
    marks = {NODE_VARIABLE: node_id}
    record = environ.get(RECORD_VARIABLE)
    return marks | {RECORD_VARIABLE: record} if record else marks


class NodeAgent:
    """The eyes and hands on a node; knows nothing of why."""

    def __init__(self, node_id: str) -> None:
        self._marks = marks_of(node_id, os.environ)
        self._pulls = Pulls()

    def residents(self) -> dict[str, list[int]]:
        """Pids of engine processes by replica."""
        running = ((process.pid, environ) for process, environ in environments())
        return by_replica(running, self._marks)

    def end(self, replica_id: str, patience_s: float) -> list[int]:
        """End all processes of a replica, SIGKILL after ``patience_s``; pids that live on."""
        for _ in range(KILL_ROUNDS):  # a process that dies may start another meanwhile
            alive = self._processes(replica_id)
            if not alive:
                break
            end_processes(alive, patience_s)
            patience_s = 0
        return [process.pid for process in self._processes(replica_id)]

    def gpu_memory(self) -> dict[int, tuple[int, int]]:
        """(used, total) MiB of every GPU by index; empty where there is no driver.

        Raises MarketFault if the driver does not answer.
        """
        return hardware.gpu_memory()

    def models(self, models_dir: str) -> list[StoredModel]:
        """What is on the node's disk or on its way there."""
        return self._pulls.stored(Path(models_dir))

    def pull(self, model: Model, models_dir: str, pin: bool | None, evict: bool) -> None:
        """Begin to pull a model; ``models`` tells how far it is."""
        self._pulls.begin(model, Path(models_dir), pin=pin, evict=evict)

    def read_in(self, name: str, models_dir: str) -> None:
        """Begin to read a model's weights into memory."""
        self._pulls.read_in(name, Path(models_dir))

    def remove_model(self, name: str, models_dir: str) -> int:
        """Remove a model; the bytes that it had. Raises NotFound, Conflict if it is in use."""
        return self._pulls.remove(name, Path(models_dir))

    def _processes(self, replica_id: str) -> list[psutil.Process]:
        return processes_with({**self._marks, REPLICA_VARIABLE: replica_id})


class Pulls:
    """Downloads of a node, each in a thread of its own."""

    def __init__(self) -> None:
        self._threads: dict[str, threading.Thread] = {}
        self._failed: dict[str, str] = {}
        self._to_pin: dict[str, bool] = {}
        self._reading: threading.Thread | None = None

    def begin(
        self, model: Model, models_dir: Path, *, pin: bool | None, evict: bool = True
    ) -> None:
        """Pull beside us; one that runs goes on. Then pin or unpin it, unless ``pin`` is None."""
        if pin is not None:
            self._to_pin[model.name] = pin
        running = self._threads.get(model.name)
        if running is None or not running.is_alive():
            self._failed.pop(model.name, None)
            thread = threading.Thread(
                target=self._pull, args=(model, models_dir, evict), name=f"pull-{model.name}"
            )
            thread.daemon = True
            self._threads[model.name] = thread
            thread.start()

    def stored(self, models_dir: Path) -> list[StoredModel]:
        """The store's models, with what pulls make of them."""
        found = {model.model: model for model in ModelStore(models_dir).stored()}
        for name, thread in self._threads.items():
            known = found.get(name) or StoredModel(name, StoredState.PARTIAL, 0, 0, 0.0)
            if thread.is_alive():  # also in the place of what is there from another source
                found[name] = replace(known, state=StoredState.PULLING)
            elif name in self._failed:
                state = known.state
                if state is StoredState.PARTIAL:
                    state = StoredState.FAILED
                found[name] = replace(known, state=state, message=self._failed[name])
        return [found[name] for name in sorted(found)]

    def read_in(self, name: str, models_dir: Path) -> None:
        """Read a model's weights beside us, one model at a time; what runs goes on."""
        if self._reading is None or not self._reading.is_alive():
            self._reading = threading.Thread(
                target=ModelStore(models_dir).read_in, args=(name,), name=f"read-{name}"
            )
            self._reading.daemon = True
            self._reading.start()

    def remove(self, name: str, models_dir: Path) -> int:
        """Raises NotFound, Conflict if it is in use or being pulled."""
        bytes_freed = ModelStore(models_dir).remove(name)
        self._failed.pop(name, None)
        return bytes_freed

    def _pull(self, model: Model, models_dir: Path, evict: bool) -> None:
        try:
            store = ModelStore(models_dir)
            store.pull(model, evict=evict)
            pin = self._to_pin.pop(model.name, None)  # who wants that may have come meanwhile
            if pin is not None:
                store.pull(model, pin=pin)
        except MarketError as error:
            self._failed[model.name] = error.message
            logger.warning("%s was not pulled: %s", model.name, error)
        except Exception as error:
            self._failed[model.name] = f"{type(error).__name__}: {error}"
            logger.exception("%s was not pulled", model.name)


class AgentClient:
    """Asks the agents of nodes, which start on demand. For threads that may wait some seconds."""

    def __init__(self) -> None:
        self._agents: dict[str, Any] = {}

    def residents(self, node_id: str) -> dict[str, list[int]]:
        """Pids of engine processes by replica. Raises Overloaded if the node does not answer."""
        found: dict[str, list[int]] = self._ask(node_id, "residents", ANSWER_TIMEOUT_S)
        return found

    def end(self, node_id: str, replica_id: str, patience_s: float) -> list[int]:
        """End all processes of a replica, SIGKILL after ``patience_s``; pids that live on.

        Raises Overloaded if the node does not answer; again is harmless.
        """
        timeout_s = patience_s + KILL_TIMEOUT_S + ANSWER_TIMEOUT_S
        left: list[int] = self._ask(node_id, "end", timeout_s, replica_id, patience_s)
        return left

    def gpu_memory(self, node_id: str) -> dict[int, tuple[int, int]]:
        """(used, total) MiB of every GPU by index; empty where there is no driver.

        Raises Overloaded if the node does not answer, MarketFault if its driver does not.
        """
        memory: dict[int, tuple[int, int]] = self._ask(node_id, "gpu_memory", ANSWER_TIMEOUT_S)
        return memory

    def models(self, node_id: str, models_dir: str) -> list[StoredModel]:
        """What is on a node's disk. Raises Overloaded if the node does not answer."""
        found: list[StoredModel] = self._ask(node_id, "models", ANSWER_TIMEOUT_S, models_dir)
        return found

    def pull(
        self, node_id: str, model: Model, models_dir: str, *, pin: bool | None, evict: bool
    ) -> None:
        """Begin to pull a model to a node. Raises Overloaded if it does not answer."""
        self._ask(node_id, "pull", ANSWER_TIMEOUT_S, model, models_dir, pin, evict)

    def read_in(self, node_id: str, name: str, models_dir: str) -> None:
        """Begin to read a model into a node's memory. Raises Overloaded if it does not answer."""
        self._ask(node_id, "read_in", ANSWER_TIMEOUT_S, name, models_dir)

    def remove_model(self, node_id: str, name: str, models_dir: str) -> int:
        """Remove a model from a node. Raises Overloaded, NotFound, Conflict."""
        removed: int = self._ask(node_id, "remove_model", REMOVE_TIMEOUT_S, name, models_dir)
        return removed

    def dismiss(self, node_id: str) -> None:
        """End the agent of a node that has left; Ray would wait for the node for ever."""
        self._agents.pop(node_id, None)
        stop_service(agent_name(node_id))

    def _ask(self, node_id: str, method: str, timeout_s: float, *arguments: Any) -> Any:
        if not _is_alive(node_id):
            raise Overloaded(f"node {node_id} is not in the cluster now", retry_after_s=5)
        call = None
        try:
            call = getattr(self._agent(node_id), method).remote(*arguments)
            return ray.get(call, timeout=timeout_s)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, Conflict | NotFound):
                raise type(cause)(cause.message) from None
            logger.error("the agent of node %s failed in %s", node_id, method, exc_info=error)
            reason = str(cause) if isinstance(cause, MarketError) else f"it failed in {method}"
            raise MarketFault(f"the agent of node {node_id}: {reason}") from error
        except RayError as error:
            # It may be restarting, or gone with its node. A call that waits must not end processes
            # later, when a replica of that name may have started again.
            self._agents.pop(node_id, None)
            if call is not None and isinstance(error, GetTimeoutError):
                ray.cancel(call)
            raise Overloaded(f"node {node_id} does not answer", retry_after_s=5) from error

    def _agent(self, node_id: str) -> Any:
        if node_id not in self._agents:
            self._agents[node_id] = (
                ray.remote(NodeAgent)
                .options(
                    name=agent_name(node_id),
                    namespace=NAMESPACE,
                    lifetime="detached",
                    get_if_exists=True,
                    max_restarts=-1,
                    max_task_retries=0,
                    max_concurrency=THREADS,
                    num_cpus=0,
                    label_selector={NODE_LABEL: node_id},
                )
                .remote(node_id)
            )
        return self._agents[node_id]


def _is_alive(node_id: str) -> bool:
    return any(node["Alive"] and node["Labels"].get(NODE_LABEL) == node_id for node in ray.nodes())
