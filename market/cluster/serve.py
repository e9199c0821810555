"""Ray and Ray Serve as the cluster on which replicas run.

Ray Serve takes seconds to import: that happens at its first use, beside the caller's loop.
"""

import contextlib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from market.catalog import Model
from market.cluster import directory
from market.cluster.agent import AgentClient, memory_is_free
from market.cluster.engines import require_engine, sleeps
from market.cluster.models import model_path
from market.cluster.node import NODE_LABEL
from market.config import Config
from market.types import (
    AppStatus,
    ClusterView,
    Deployment,
    Offer,
    Replica,
    ReplicaState,
    Spare,
    StoredModel,
    app_name,
)

if TYPE_CHECKING:
    from ray import serve

MODEL_APP = "serve_apps.model:build_app"
MODEL_SETTINGS = "serve_apps.model:settings_of"
SPARE_APP = "serve_apps.model:build_spare"
ADOPT = "serve_apps.link:adopt"
END_PATIENCE_S = 10.0
RUNNING, RECOVERING, DEPLOY_FAILED = "RUNNING", "RECOVERING", "DEPLOY_FAILED"
# While settings are being changed, what is seen is half of before and half of after.
CHANGING = "DEPLOYING", "UPDATING"


class ServeCluster:
    """One Serve application per replica; calls return before applications are ready."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._agents = AgentClient()

    def check(self, model: Model, engine: str) -> None:
        """Raises InvalidRequest or NotFound if the engine or the model's files are missing."""
        require_engine(engine, model.embeds)
        model_path(model, self._config.models_dir)

    def look(self) -> ClusterView:
        """Nodes that live, by our own names, and applications with the replica that serves."""
        from ray.serve.context import _get_global_client

        nodes = frozenset(
            node["Labels"][NODE_LABEL]
            for node in ray.nodes()
            if node["Alive"] and NODE_LABEL in node.get("Labels", {})
        )
        details = _get_global_client().get_serve_details()
        return ClusterView(
            nodes, {name: _status(app) for name, app in details["applications"].items()}
        )

    def start(self, replica: Replica, deployment: Deployment, model: Model, offer: Offer) -> None:
        """Begin to run a replica's application, or to change it in place."""
        settings = import_builder(MODEL_SETTINGS)(
            replica,
            deployment,
            model,
            offer,
            Path(self._models_dir(offer)),
            self._config.sequences,
        )
        if replica.process and replica.state is ReplicaState.STARTING:
            _adopt(replica.app_name, settings)
        app = import_builder(MODEL_APP)(replica, deployment, offer, settings)
        run_application(app, replica.app_name, route_prefix=None)

    def start_spare(self, spare: Spare, offer: Offer) -> None:
        """Begin to run a process that waits for a model."""
        app = import_builder(SPARE_APP)(spare.process, spare.engine, offer)
        run_application(app, app_name(spare.process), route_prefix=None)

    def can_sleep(self, engine: str, offer: Offer) -> bool:
        """Whether an engine can leave the node's GPUs without ending."""
        return sleeps(engine, logical=offer.logical)

    def remove(self, app_name: str) -> None:
        """Begin to drain and remove an application."""
        from ray import serve

        serve.delete(app_name, _blocking=False)
        directory.forget(app_name)

    def residents(self, node_id: str) -> frozenset[str]:
        """Replicas with processes on a node. Raises Overloaded if it does not answer."""
        return frozenset(self._agents.residents(node_id))

    def memory_taken(self, node_id: str, others_milli: Mapping[int, int]) -> frozenset[int]:
        """Which of these GPUs have more memory in use than the shares of others explain."""
        if not others_milli:
            return frozenset()
        memory = self._agents.gpu_memory(node_id)
        return frozenset(
            index
            for index, milli in others_milli.items()
            if index in memory and not memory_is_free(*memory[index], milli)
        )

    def end(self, replica_id: str, node_id: str) -> None:
        """End what a replica left running on a node."""
        self._agents.end(node_id, replica_id, END_PATIENCE_S)

    def models(self, offer: Offer) -> tuple[StoredModel, ...]:
        """What is on the node's disk."""
        return tuple(self._agents.models(offer.node_id, self._models_dir(offer)))

    def pull(self, model: Model, offer: Offer, *, pin: bool | None, evict: bool) -> None:
        """Begin to pull a model to a node."""
        folder = self._models_dir(offer)
        self._agents.pull(offer.node_id, model, folder, pin=pin, evict=evict)

    def read_in(self, model: Model, offer: Offer) -> None:
        """Begin to read a model's weights into a node's memory."""
        self._agents.read_in(offer.node_id, model.name, self._models_dir(offer))

    def remove_model(self, name: str, offer: Offer) -> int:
        """Remove a model from a node's disk."""
        return self._agents.remove_model(offer.node_id, name, self._models_dir(offer))

    def _models_dir(self, offer: Offer) -> str:
        return offer.models_dir or str(self._config.models_dir)


def _adopt(name: str, settings: dict[str, Any]) -> None:
    """Tell a spare process its model before Serve does; if it cannot be told, Serve will."""
    entry = directory.find(name)
    if entry is not None:
        with contextlib.suppress(OSError):
            import_builder(ADOPT)(entry, settings)


def import_builder(path: str) -> "Callable[..., Any]":
    """The function behind ``module:function``; Serve apps are above us, so known by name only."""
    module, _, name = path.partition(":")
    builder: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return builder


def run_application(app: "serve.Application", name: str, route_prefix: str | None) -> None:
    """Hand an application to Serve beside the others, without waiting for it."""
    from ray import serve

    target = serve.RunTarget(target=app, name=name, route_prefix=route_prefix)
    serve.run_many([target], wait_for_applications_running=False)


def _status(app: Mapping[str, Any]) -> AppStatus:
    deployments = list(app["deployments"].values())
    replicas = [replica for deployment in deployments for replica in deployment["replicas"]]
    runs = sorted(
        f"{replica['replica_id']}:{replica['pid']}"
        for replica in replicas
        if replica["state"] == RUNNING
    )
    changing = any(state["status"] in CHANGING for state in (app, *deployments))
    settings: dict[str, Any] = {}
    for deployment in deployments:
        settings |= deployment["deployment_config"]["user_config"] or {}
    return AppStatus(
        run=runs[0] if runs and not changing else None,
        failed=app["status"] == DEPLOY_FAILED,
        message=_reason(app),
        replica_id=settings.get("replica_id", ""),
        asleep=settings.get("asleep", False),
        unsure=any(
            replica["state"] == RECOVERING or (replica["state"] == RUNNING and changing)
            for replica in replicas
        ),
    )


def _reason(app: Mapping[str, Any]) -> str:
    """The last line of what Serve says: of a failed start, the error itself."""
    messages = [deployment["message"] for deployment in app["deployments"].values()]
    lines = "\n".join(filter(None, [app["message"], *messages])).strip().splitlines()
    return lines[-1].strip() if lines else ""
