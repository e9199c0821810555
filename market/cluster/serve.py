"""Ray Serve as the cluster on which deployments run."""

import importlib
import importlib.util
from collections.abc import Callable

from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ReplicaState

from market.catalog import Model, find
from market.cluster.models import model_path
from market.config import Config
from market.errors import InvalidRequest
from market.types import AppStatus, Deployment, Offer

MODEL_APP = "serve_apps.model:build_app"
ENGINE_PACKAGES = {"transformers": "transformers", "vllm": "vllm"}


class ServeCluster:
    """One Serve application per deployment; calls return before applications are ready."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def check(self, model: Model, engine: str) -> None:
        """Raises InvalidRequest or NotFound if the engine or the model's files are missing."""
        package = ENGINE_PACKAGES.get(engine)
        if package is None:
            known = " or ".join(ENGINE_PACKAGES)
            raise InvalidRequest(f"engine {engine!r} is unknown; use {known}", param="engine")
        if importlib.util.find_spec(package) is None:
            raise InvalidRequest(
                f"engine {engine} is not installed here; run: scripts/setup --engine {engine}",
                param="engine",
            )
        model_path(model, self._config.models_dir)

    def observe(self) -> dict[str, AppStatus]:
        """Applications by name."""
        return {
            name: AppStatus(
                running=_has_replicas(app),
                failed=app.status is ApplicationStatus.DEPLOY_FAILED,
                message=_reason(app),
            )
            for name, app in serve.status().applications.items()
        }

    def start(self, deployment: Deployment, offer: Offer) -> None:
        """Begin to run the deployment's application."""
        app = import_builder(MODEL_APP)(
            deployment, find(deployment.model), offer, self._config.models_dir
        )
        run_application(app, deployment.app_name, route_prefix=None)

    def remove(self, app_name: str) -> None:
        """Begin to drain and remove an application."""
        serve.delete(app_name, _blocking=False)


def import_builder(path: str) -> Callable[..., serve.Application]:
    """The function behind ``module:function``; Serve apps are above us, so known by name only."""
    module, _, name = path.partition(":")
    builder: Callable[..., serve.Application] = getattr(importlib.import_module(module), name)
    return builder


def run_application(app: serve.Application, name: str, route_prefix: str | None) -> None:
    """Hand an application to Serve beside the others, without waiting for it."""
    target = serve.RunTarget(target=app, name=name, route_prefix=route_prefix)
    serve.run_many([target], wait_for_applications_running=False)


def _has_replicas(app: ApplicationStatusOverview) -> bool:
    """Whether requests can be served: one replica of several is enough."""
    states = [deployment.replica_states for deployment in app.deployments.values()]
    return bool(states) and all(state.get(ReplicaState.RUNNING, 0) > 0 for state in states)


def _reason(app: ApplicationStatusOverview) -> str:
    """The last line of what Serve says: of a failed start, the error itself."""
    messages = [deployment.message for deployment in app.deployments.values()]
    lines = "\n".join(filter(None, [app.message, *messages])).strip().splitlines()
    return lines[-1].strip() if lines else ""
