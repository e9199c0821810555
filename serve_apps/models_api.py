"""``/market/v1``: the catalog, and what is on the nodes' disks."""

import asyncio
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from market import pricing
from market.catalog import Model
from market.cluster.facts import read_facts
from market.ledger.registry import check_name
from market.scheduler.service import deployment_state
from serve_apps.auth import require_operator
from serve_apps.http import Caller, Name, Services, Strict, With, Words
from serve_apps.market_api import price_row

router = APIRouter(prefix="/market/v1")


class NewModel(Strict):
    """Body of ``POST /models``: a name for the model at a source, and its first prices.

    Prices are per million tokens; ``cached_input_price`` defaults to that of input. What the model
    is and needs is read from its files; ``parameters`` is for quantized ones, which do not say it.
    Parsers are vLLM's, by name.
    """

    name: Name
    source: Words
    input_price: Name
    output_price: Name
    cached_input_price: Name | None = None
    licence: Name = "unknown"
    tool_parser: Name = "hermes"
    reasoning_parser: Name | Literal[""] = ""
    parameters: Annotated[int, Field(ge=1, le=10**15)] | None = None


class Pull(Strict):
    """Body of ``POST /stored-models``: to these nodes, or to all that are open.

    ``pin``: keep it, or unpin it; null leaves that as it is.
    """

    model: Name
    nodes: tuple[Name, ...] = ()
    pin: bool | None = None


@router.get("/models")
async def models(services: With, _caller: Caller) -> list[dict[str, Any]]:
    """The catalog with prices in force and whether a model is deployed."""
    return await _rows(services)


@router.post("/models")
async def add_model(body: NewModel, services: With, caller: Caller) -> dict[str, Any]:
    """Add a model to the catalog at its first prices; the same again changes nothing."""
    require_operator(caller)
    check_name("model", body.name)
    known = {model.name: model for model in await services.scheduler.models()}.get(body.name)
    told = _told(body)
    if known is None:
        facts = await asyncio.to_thread(read_facts, body.source, body.parameters)
        wanted = Model(body.name, **{**asdict(facts), **told})
    else:  # its source need not answer again
        wanted = replace(known, **told)
    await services.scheduler.add_model(wanted)
    (row,) = [row for row in await _rows(services) if row["model"] == body.name]
    return {"created": known is None, **row}


@router.delete("/models/{model}")
async def forget_model(model: Name, services: With, caller: Caller) -> dict[str, Any]:
    """Take a model that was added out of the catalog; one that is in use stays."""
    require_operator(caller)
    forgotten = await services.scheduler.forget_model(model)
    return {"model": forgotten.name, "source": forgotten.source, "state": "forgotten"}


@router.get("/stored-models")
async def stored(services: With, caller: Caller, model: Name | None = None) -> list[dict[str, Any]]:
    """What is on each node's disk or on its way there."""
    require_operator(caller)
    return [
        {"node_id": node_id, **asdict(entry)}
        for node_id, entries in sorted((await services.scheduler.stored_models()).items())
        for entry in entries
        if model in (None, entry.model)
    ]


@router.post("/stored-models")
async def pull(body: Pull, services: With, caller: Caller) -> dict[str, Any]:
    """Begin to pull a model; ``GET`` tells how far it is. Again goes on or changes nothing."""
    require_operator(caller)
    model = await services.scheduler.model(body.model)
    nodes = await services.scheduler.pull_model(model.name, body.nodes, body.pin)
    return {"model": model.name, "source": model.source, "nodes": nodes}


@router.delete("/stored-models/{model}")
async def remove(
    model: Name, services: With, caller: Caller, node: Annotated[list[Name] | None, Query()] = None
) -> dict[str, Any]:
    """Remove a model from nodes, or from all; one that is in use stays."""
    require_operator(caller)
    freed = await services.scheduler.remove_model(model, node or [])
    return {"model": model, "freed_bytes": freed}


def _told(body: NewModel) -> dict[str, Any]:
    """What the operator says of a model, prices in their shortest form. Raises InvalidRequest."""
    prices = {
        "input_price": body.input_price,
        "cached_input_price": body.cached_input_price or body.input_price,
        "output_price": body.output_price,
    }
    told = body.model_dump(include={"source", "licence", "tool_parser", "reasoning_parser"})
    if body.parameters is not None:
        told["parameters"] = body.parameters
    return told | {
        name: pricing.format_price(pricing.parse_price(text, name)) for name, text in prices.items()
    }


async def _rows(services: Services) -> list[dict[str, Any]]:
    cards = {card.model: card for card in await services.ledger.rate_cards()}
    states = {
        deployment.model: str(deployment_state(deployment, replicas)[0])
        for deployment, replicas in await services.scheduler.deployments()
        if deployment.tenant_id is None
    }
    return [
        {
            "model": model.name,
            "source": model.source,
            "licence": model.licence,
            "parameters": model.parameters,
            "weights_bytes": model.weights_bytes,
            "memory_mib": model.memory_mib,
            "context_tokens": model.context_tokens,
            "runs_on_cpu": model.runs_on_cpu,
            "state": states.get(model.name, "not deployed"),
            **price_row(cards.get(model.name)),
        }
        for model in await services.scheduler.models()
    ]
