"""Desired deployments against observed Serve applications -> steps. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from market.types import AppStatus, Deployment, DeploymentState

APP_PREFIX = "model-"


@dataclass(frozen=True, slots=True)
class Start:
    """Make the application exist."""

    deployment: Deployment


@dataclass(frozen=True, slots=True)
class Remove:
    """Make the application not exist."""

    app_name: str


@dataclass(frozen=True, slots=True)
class Mark:
    """Remember a state and why."""

    deployment_id: str
    state: DeploymentState
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """The deployment is gone from the cluster: drop it from the books of what should run."""

    deployment_id: str


Step = Start | Remove | Mark | Forget


def plan(desired: Sequence[Deployment], observed: Mapping[str, AppStatus]) -> list[Step]:
    """Steps that bring Serve closer to what is wanted; none if nothing differs."""
    steps: list[Step] = []
    wanted = {deployment.app_name for deployment in desired}
    for app_name in sorted(observed):
        if app_name.startswith(APP_PREFIX) and app_name not in wanted:
            steps.append(Remove(app_name))
    for deployment in desired:
        steps.extend(_steps(deployment, observed.get(deployment.app_name)))
    return steps


def _steps(deployment: Deployment, seen: AppStatus | None) -> list[Step]:
    if deployment.state is DeploymentState.STOPPING:
        gone = seen is None
        return [Forget(deployment.deployment_id) if gone else Remove(deployment.app_name)]
    if seen is None:
        failed = deployment.state is DeploymentState.FAILED
        if failed:
            return []
        starting = _mark(deployment, DeploymentState.STARTING, "replica starting")
        return [*starting, Start(deployment)]
    if seen.failed:
        return _mark(
            deployment, DeploymentState.FAILED, seen.message or "the replica did not start"
        )
    if seen.running:
        return _mark(deployment, DeploymentState.READY, "serving")
    return _mark(deployment, DeploymentState.STARTING, seen.message or "replica starting")


def _mark(deployment: Deployment, state: DeploymentState, reason: str) -> list[Step]:
    if (deployment.state, deployment.reason) == (state, reason):
        return []
    return [Mark(deployment.deployment_id, state, reason)]
