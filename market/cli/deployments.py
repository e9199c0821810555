"""``market deploy``, ``undeploy`` and ``deployments``; offers beside them."""

import time
from typing import Annotated, Any

import typer

from market.cli.output import Output, OutputOption, note, show

COLUMNS = ("model", "mode", "engine", "replicas", "state", "reason")
POLL_S = 0.3


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command(epilog="Example: market deploy tiny-qwen --mode tokens --engine vllm")(deploy)
    app.command(epilog="Example: market undeploy tiny-qwen")(undeploy)
    app.command(epilog="Example: market deployments --output json")(deployments)
    app.command(epilog="Example: market offers")(offers)


def deploy(
    model: Annotated[str, typer.Argument(help="A model of the catalog (market models ls).")],
    mode: Annotated[str, typer.Option(help="How it is sold: tokens.")] = "tokens",
    engine: Annotated[str | None, typer.Option(help="vllm or transformers.")] = None,
    replicas: Annotated[int, typer.Option(help="How many replicas.", min=1)] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say where it would go.")] = False,
    wait: Annotated[bool, typer.Option(help="Wait until it serves.")] = True,
    timeout_s: Annotated[float, typer.Option(help="Longest wait.")] = 600,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a model available."""
    from market.cli.api import request

    order = {
        "model": model,
        "mode": mode,
        "engine": engine,
        "replicas": replicas,
        "dry_run": dry_run,
    }
    deployment = request("POST", "/deployments", json=order)
    if wait and not dry_run:
        deployment = _wait(deployment, timeout_s)
    show(output, deployment, COLUMNS)


def undeploy(
    model: Annotated[str, typer.Argument(help="A deployed model.")],
    timeout_s: Annotated[float, typer.Option(help="Longest wait.")] = 120,
    output: OutputOption = Output.TABLE,
) -> None:
    """Drain a model and stop serving it."""
    from market.cli.api import request
    from market.errors import MarketFault

    stopping = request("DELETE", f"/deployments/{model}")
    deadline = time.monotonic() + timeout_s
    while _find(stopping["deployment_id"]) is not None:
        if time.monotonic() > deadline:
            raise MarketFault(f"{model} still drains after {timeout_s:.0f} s")
        time.sleep(POLL_S)
    show(output, {"model": model, "state": "removed"})


def deployments(output: OutputOption = Output.TABLE) -> None:
    """List what is deployed."""
    from market.cli.api import request

    show(output, request("GET", "/deployments"), COLUMNS, empty="no deployments")


def offers(output: OutputOption = Output.TABLE) -> None:
    """List what providers offer."""
    from market.cli.api import request

    rows = request("GET", "/offers")
    columns = ("offer_id", "provider_id", "node_id", "gpu_type", "cpu_count", "memory_mib", "ask")
    show(output, rows, columns)


def _wait(deployment: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Poll until it serves. Raises MarketFault if it fails or takes too long."""
    from market.errors import MarketFault

    began = time.monotonic()
    told = ""
    current: dict[str, Any] | None = deployment
    while current is not None and current["state"] != "ready":
        if current["state"] == "failed":
            raise MarketFault(f"{current['model']} did not start: {current['reason']}")
        if time.monotonic() - began > timeout_s:
            raise MarketFault(f"{current['model']} not ready after {timeout_s:.0f} s: {told}")
        if current["reason"] != told:
            told = current["reason"]
            note(f"market: {current['model']}: {told.splitlines()[0]}")
        time.sleep(POLL_S)
        current = _find(deployment["deployment_id"])
    if current is None:
        raise MarketFault(f"{deployment['model']} was removed while it started")
    return current


def _find(deployment_id: str) -> dict[str, Any] | None:
    from market.cli.api import request

    found = [d for d in request("GET", "/deployments") if d["deployment_id"] == deployment_id]
    return found[0] if found else None
