"""``/market/v1/stored-models``: what is on the nodes' disks; pull it ahead, remove it."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from market import catalog
from serve_apps.auth import require_operator
from serve_apps.http import Caller, Name, Strict, With

router = APIRouter(prefix="/market/v1/stored-models")


class Pull(Strict):
    """Body of ``POST /stored-models``: to these nodes, or to all that are open.

    ``pin``: keep it, or unpin it; null leaves that as it is.
    """

    model: Name
    nodes: tuple[Name, ...] = ()
    pin: bool | None = None


@router.get("")
async def stored(services: With, caller: Caller, model: Name | None = None) -> list[dict[str, Any]]:
    """What is on each node's disk or on its way there."""
    require_operator(caller)
    return [
        {"node_id": node_id, **asdict(entry)}
        for node_id, entries in sorted((await services.scheduler.stored_models()).items())
        for entry in entries
        if model in (None, entry.model)
    ]


@router.post("")
async def pull(body: Pull, services: With, caller: Caller) -> dict[str, Any]:
    """Begin to pull a model; ``GET`` tells how far it is. Again goes on or changes nothing."""
    require_operator(caller)
    model = catalog.find(body.model)
    nodes = await services.scheduler.pull_model(model.name, body.nodes, body.pin)
    return {"model": model.name, "source": model.source, "nodes": nodes}


@router.delete("/{model}")
async def remove(
    model: Name, services: With, caller: Caller, node: Annotated[list[Name] | None, Query()] = None
) -> dict[str, Any]:
    """Remove a model from nodes, or from all; one that is in use stays."""
    require_operator(caller)
    freed = await services.scheduler.remove_model(model, node or [])
    return {"model": model, "freed_bytes": freed}
