"""``/market/v1``: supply and demand of GPUs: offers, nodes, deployments, orders, leases."""

from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any, Literal

from fastapi import APIRouter, Request

from market import leases, pricing, when
from market.errors import InvalidRequest
from market.scheduler.core import has_gpus
from market.scheduler.nodes import Proof
from market.scheduler.orders import Quote
from market.scheduler.service import deployment_state
from market.types import (
    Deployment,
    Lane,
    LanePolicy,
    Lease,
    Mode,
    Order,
    Principal,
    Replica,
    ReplicaState,
    Role,
)
from serve_apps.auth import (
    require_lane,
    require_model,
    require_operator,
    require_provider,
    require_tenant,
)
from serve_apps.fleet_bodies import (
    LeaseChange,
    Leaving,
    NewDeployment,
    NewNode,
    NewOrder,
    Renewal,
    bounds_of,
    limit_of,
    offer_of,
    order_of,
    policy_of,
    require_used,
)
from serve_apps.http import Caller, Name, Services, With, principal_of

router = APIRouter(prefix="/market/v1")


# -- supply ----------------------------------------------------------------------------------


@router.get("/offers")
async def offers(services: With, _caller: Caller) -> list[dict[str, Any]]:
    """What providers offer, and how much of each GPU is taken."""
    return await _offers(services)


@router.post("/providers/{provider_id}/join-tokens")
async def make_join_token(provider_id: Name, services: With, caller: Caller) -> dict[str, str]:
    """A one-time token with which one node of the provider can join within the hour."""
    require_provider(caller, provider_id)
    if provider_id not in await services.ledger.providers():
        raise InvalidRequest(
            f"provider {provider_id!r} does not exist (market providers create {provider_id})"
        )
    token = await services.scheduler.make_join_token(provider_id)
    return {"provider_id": provider_id, "join_token": token, "valid_for": "1h"}


@router.post("/nodes")
async def join(body: NewNode, services: With) -> dict[str, str]:
    """Let a node in. It gets what a Ray node needs, and nothing else."""
    offer = offer_of(body.node, services.clock.now())
    key = await services.scheduler.join(offer, Proof(body.join_token, body.node_key))
    address, token = services.ray_access()
    return {
        "node_id": offer.node_id,
        "node_key": key,
        "ray_address": address,
        "ray_token": token,
    }


@router.post("/nodes/{node_id}/drain")
async def drain(
    node_id: Name, services: With, caller: Caller, back: bool = False
) -> dict[str, Any]:
    """Match nothing more with a node (``back``: do again); what runs there runs on."""
    await _require_own_node(services, caller, node_id)
    offer = await services.scheduler.drain(node_id, back)
    return await _offer_row(services, offer.offer_id)


@router.post("/nodes/{node_id}/leave")
async def leave(node_id: Name, body: Leaving, services: With, request: Request) -> dict[str, Any]:
    """Take a node out for good; with ``force`` its leases end, unpaid from now on."""
    if body.node_key is not None:
        await services.scheduler.require_node_key(node_id, body.node_key)
    else:
        await _require_own_node(services, await principal_of(request), node_id)
    offer = await services.scheduler.leave(node_id, body.force)
    return await _offer_row(services, offer.offer_id)


# -- demand ----------------------------------------------------------------------------------


@router.post("/deployments")
async def deploy(body: NewDeployment, services: With, caller: Caller) -> dict[str, Any]:
    """Make a model available; returns at once, the state tells when it serves."""
    require_used(body)
    policy = policy_of(body)
    if body.mode in (Mode.LEASE, Mode.HYBRID):
        return await _lease(body, policy, services, caller)
    if body.mode is Mode.AUTO:
        assert policy is not None
        tenant_id = _for_tenant(body, caller)
        for model in filter(None, (body.model, body.cheap, body.strong)):
            require_model(caller, model)
        made = await services.scheduler.open_auto(body.model, tenant_id, policy, body.dry_run)
        return deployment_row(made, ())
    require_operator(caller)
    bounds = bounds_of(body)
    found = await services.scheduler.open_pool(body.model, body.engine, bounds, body.dry_run)
    return deployment_row(*found)


@router.post("/quotes")
async def quote(body: NewOrder, services: With, caller: Caller) -> dict[str, Any]:
    """What an order would get right now: place, price, what would be held; or why not."""
    order = await _order(body, services, caller)
    return quote_row(order, await services.scheduler.quote(order))


@router.get("/deployments")
async def deployments(services: With, caller: Caller) -> list[dict[str, Any]]:
    """What should run, and its state. Tenants see pools and their own; providers have leases."""
    tenant_id = require_tenant(caller)
    reasons = await services.scheduler.scaling()
    return [
        deployment_row(deployment, replicas)
        | {"scaling": reasons.get(deployment.deployment_id, "")}
        for deployment, replicas in await services.scheduler.deployments()
        if tenant_id is None or deployment.tenant_id in (None, tenant_id)
    ]


@router.delete("/deployments/{name}")
async def undeploy(name: Name, services: With, caller: Caller) -> dict[str, Any]:
    """Drain and remove a deployment, named by model or id; a lease's is released."""
    tenant_id = require_tenant(caller)
    for deployment, _ in await services.scheduler.deployments():
        named = name in (deployment.deployment_id, deployment.model)
        if named and tenant_id in (None, deployment.tenant_id):
            require_model(caller, deployment.model)
            if deployment.lease_id is not None:
                require_lane(caller, Lane.LEASE)
    deployment = await services.scheduler.undeploy(name, tenant_id)
    return deployment_row(deployment, ())


@router.get("/orders")
async def orders(services: With, caller: Caller) -> list[dict[str, Any]]:
    """Orders that wait and orders lately refused, each with its reason."""
    return [order_row(order) for order in await services.scheduler.orders(require_tenant(caller))]


@router.delete("/orders/{order_id}")
async def cancel_order(order_id: Name, services: With, caller: Caller) -> dict[str, Any]:
    """Take a waiting order back."""
    tenant_id = require_tenant(caller)
    for order in await services.scheduler.orders(tenant_id):
        if order.order_id == order_id:
            _require_leasing(caller, order.model)
    return order_row(await services.scheduler.cancel_order(order_id, tenant_id))


@router.get("/leases")
async def list_leases(services: With, caller: Caller, closed: bool = False) -> list[dict[str, Any]]:
    """Leases: a tenant's own, those on a provider's nodes, or all."""
    found = await services.scheduler.leases(closed=closed, **_whose(caller))
    return [lease_row(lease) for lease in found]


@router.get("/leases/{lease_id}")
async def show_lease(lease_id: Name, services: With, caller: Caller) -> dict[str, Any]:
    """One lease."""
    return lease_row(await services.scheduler.lease(lease_id, **_whose(caller)))


@router.post("/leases/{lease_id}/renew")
async def renew(lease_id: Name, body: Renewal, services: With, caller: Caller) -> dict[str, Any]:
    """Let a lease last longer, at its price."""
    term_s = when.duration(body.term, "term")
    tenant_id = await _holder(services, caller, lease_id)
    return lease_row(await services.scheduler.renew(lease_id, term_s, tenant_id))


@router.patch("/leases/{lease_id}")
async def change_lease(
    lease_id: Name, body: LeaseChange, services: With, caller: Caller
) -> dict[str, Any]:
    """Sell its idle time or not; change how a hybrid spills, from the next request on."""
    asked = body.model_fields_set
    policy: dict[str, Any] = {}
    if "spill_budget" in asked:
        policy["spill_pico"] = limit_of(body.spill_budget, "spill_budget")
    if "ttft_s" in asked:
        policy["ttft_s"] = body.ttft_s
    resale = body.resale if "resale" in asked else None
    tenant_id = await _holder(services, caller, lease_id, *([Lane.SPILL] if policy else []))
    changed = await services.scheduler.change_lease(lease_id, resale, policy, tenant_id)
    deployments = [deployment for deployment, _ in await services.scheduler.deployments()]
    policies = [d.policy for d in deployments if d.lease_id == lease_id]
    return lease_row(changed) | {"policy": _policy_row(next(iter(policies), None))}


@router.post("/leases/{lease_id}/release")
async def release(lease_id: Name, services: With, caller: Caller) -> dict[str, Any]:
    """End a lease now: nothing more is charged."""
    tenant_id = await _holder(services, caller, lease_id)
    return lease_row(await services.scheduler.release(lease_id, tenant_id))


async def _lease(
    body: NewDeployment, policy: LanePolicy | None, services: Services, caller: Principal
) -> dict[str, Any]:
    order = replace(await _order(body, services, caller), policy=policy)
    if policy is not None:
        require_lane(caller, Lane.SPILL)
    if body.dry_run:
        return {"dry_run": True, **quote_row(order, await services.scheduler.quote(order))}
    placed = await services.scheduler.order(order, body.queue)
    answer: dict[str, Any] = {"order": order_row(placed), "lease": None}
    if placed.lease_id is not None:
        lease = await services.scheduler.lease(placed.lease_id)
        answer["lease"] = lease_row(lease)
        for deployment, replicas in await services.scheduler.deployments():
            if deployment.lease_id == lease.lease_id:
                return {**deployment_row(deployment, replicas), **answer}
    waiting = {"state": placed.state, "reason": placed.reason, "deployment_id": placed.lease_id}
    return {"model": body.model, "mode": body.mode, **waiting, **answer}


async def _order(body: NewOrder, services: Services, caller: Principal) -> Order:
    tenant_id = _for_tenant(body, caller)
    _require_leasing(caller, body.model)
    model = await services.scheduler.model(body.model)
    return order_of(body, model, tenant_id, caller.api_key_id, services.clock.now())


def _for_tenant(body: NewOrder, caller: Principal) -> str:
    """For whom it is. Raises InvalidRequest, PermissionDenied."""
    tenant_id = require_tenant(caller, body.tenant_id)
    if tenant_id is None:
        raise InvalidRequest("tenant_id: say for whom it is (--tenant NAME)", param="tenant_id")
    return tenant_id


# -- who may what ----------------------------------------------------------------------------


def _whose(caller: Principal) -> dict[str, str | None]:
    """Whose leases a key may see: a tenant's, those on a provider's nodes, or (nothing) all."""
    if caller.role is Role.PROVIDER:
        return {"provider_id": caller.subject_id}
    return {"tenant_id": require_tenant(caller)}


def _require_leasing(caller: Principal, model: str, *more: Lane) -> None:
    """Raises PermissionDenied unless the key may have to do with leases of the model."""
    require_model(caller, model)
    for lane in (Lane.LEASE, *more):
        require_lane(caller, lane)


async def _holder(services: Services, caller: Principal, lease_id: str, *more: Lane) -> str | None:
    """Whose lease the key may change; None: whoever's. Raises PermissionDenied, NotFound."""
    tenant_id = require_tenant(caller)
    lease = await services.scheduler.lease(lease_id, tenant_id)
    _require_leasing(caller, lease.model, *more)
    return tenant_id


async def _require_own_node(services: Services, caller: Principal, node_id: str) -> None:
    offers = {offer.node_id: offer for offer in await services.scheduler.offers()}
    if node_id in offers:
        require_provider(caller, offers[node_id].provider_id)
    else:
        require_operator(caller)


# -- from values to JSON ---------------------------------------------------------------------


async def _offers(services: Services) -> list[dict[str, Any]]:
    held: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for deployment, replicas in await services.scheduler.deployments():
        for replica in replicas:
            for index in replica.place.gpu_indices if has_gpus(replica) else ():
                held.setdefault((replica.place.offer_id, index), []).append(
                    {"model": deployment.model, "milli": replica.place.gpu_milli}
                    | {"mode": deployment.mode, "state": replica.state}
                )
    rows = []
    for offer in await services.scheduler.offers():
        row = asdict(offer)
        row["ask"] = pricing.format_money(row.pop("ask_pico"))
        for gpu in row["gpus"]:
            gpu["used"] = held.get((offer.offer_id, gpu["index"]), [])
        rows.append({name: _plain(value) for name, value in row.items()})
    return rows


async def _offer_row(services: Services, offer_id: str) -> dict[str, Any]:
    return next(row for row in await _offers(services) if row["offer_id"] == offer_id)


def deployment_row(
    deployment: Deployment, replicas: tuple[Replica, ...] | tuple[()]
) -> dict[str, Any]:
    """A deployment with the state its replicas amount to, and their places."""
    state, reason = deployment_state(deployment, replicas)
    places = [
        {"replica_id": r.replica_id, **asdict(r.place), "state": r.state, "reason": r.reason}
        for r in replicas
    ]
    ready = sum(replica.state is ReplicaState.READY for replica in replicas)
    values = {name: _plain(value) for name, value in asdict(deployment).items()}
    bounds = values.pop("bounds")
    spend = bounds.pop("spend_max_pico")
    bounds["spend_max"] = None if spend is None else pricing.format_money(spend)
    return {
        **values,
        "replicas": bounds,
        "policy": _policy_row(deployment.policy),
        "state": state,
        "reason": reason,
        "ready": ready,
        "places": places,
    }


def order_row(order: Order) -> dict[str, Any]:
    """An order as JSON."""
    row = {name: _plain(value) for name, value in asdict(order).items()}
    price = row.pop("max_price_pico")
    row["max_price"] = None if price is None else pricing.format_money(price)
    return row | {"policy": _policy_row(order.policy)}


def _policy_row(policy: LanePolicy | None) -> dict[str, Any] | None:
    if policy is None:
        return None
    row = asdict(policy)
    spill = row.pop("spill_pico")
    return row | {"spill_budget": None if spill is None else pricing.format_money(spill)}


def lease_row(lease: Lease) -> dict[str, Any]:
    """A lease as JSON; times in seconds, money as exact decimals."""
    shown = ("lease_id", "order_id", "tenant_id", "model", "engine", "provider_id", "node_id",
             "gpu_type", "gpu_indices", "gpu_count", "gpu_milli", "price_id", "currency", "start",
             "end", "state", "close_reason", "reason", "created_at", "activated_at", "closed_at",
             "metered_until", "covered_until", "resale")  # fmt: skip
    row = {name: _plain(getattr(lease, name)) for name in shown}
    return row | {
        "price_per_gpu_hour": pricing.format_money(lease.gpu_hour_pico),
        "charged": pricing.format_money(lease.charged_pico),
        "healthy_s": lease.healthy_us / 1e6,
        "credited_s": lease.credited_us / 1e6,
        "gpu_s": lease.gpu_us / 1e6,
        "drains_from": leases.drains_from(lease).isoformat(),
    }


def quote_row(order: Order, quote: Quote) -> dict[str, Any]:
    """A quote as JSON; ``fits`` false comes with the reason and the earliest start."""
    match = quote.match
    fits: Literal[True, False] = match is not None
    row: dict[str, Any] = {"model": order.model, "fits": fits, "reason": quote.reason}
    row["earliest_start"] = None if quote.earliest is None else quote.earliest.isoformat()
    if match is None:
        return row
    return row | {
        "offer_id": match.offer.offer_id,
        "provider_id": match.offer.provider_id,
        "node_id": match.place.node_id,
        "gpu_type": match.offer.gpu_type,
        "gpu_indices": list(match.place.gpu_indices),
        "gpu_count": order.gpu_count,
        "gpu_milli": order.gpu_milli,
        "start": match.start.isoformat(),
        "end": match.end.isoformat(),
        "term_s": (match.end - match.start) // timedelta(seconds=1),
        "price_per_gpu_hour": pricing.format_money(quote.gpu_hour_pico),
        "price_per_hour": pricing.format_money(quote.hour_pico),
        "total": pricing.format_money(quote.total_pico),
        "held": pricing.format_money(quote.held_pico),
        "currency": match.offer.currency,
    }


def _plain(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else value


@router.get("/status")
async def status(services: With, caller: Caller) -> dict[str, Any]:
    """Offers, deployments, leases, orders and the ledger in one answer."""
    require_operator(caller)
    ledger = await services.ledger.status()
    return {
        "offers": await _offers(services),
        "deployments": await deployments(services, caller),
        "leases": await list_leases(services, caller),
        "orders": await orders(services, caller),
        "ledger": ledger,
        "scheduler": await services.scheduler.status(),
        "tenants": len(await services.ledger.tenants()),
    }
