"""``/market/v1``: supply and demand of GPUs: offers, nodes, deployments, orders, leases."""

import contextlib
import re
import uuid
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from market import catalog, leases, pricing
from market.errors import InvalidRequest, PermissionDenied
from market.scheduler.core import has_gpus
from market.scheduler.nodes import Proof
from market.scheduler.orders import Quote
from market.scheduler.service import deployment_state
from market.types import (
    CURRENCY,
    TERM_MAX_S,
    Bounds,
    Deployment,
    Gpu,
    LanePolicy,
    Lease,
    Mode,
    Offer,
    Order,
    Principal,
    Replica,
    ReplicaState,
    Role,
)
from serve_apps.auth import require_operator, require_provider
from serve_apps.http import Caller, Services, With, principal_of

router = APIRouter(prefix="/market/v1")

TERM_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
AUTO_FIELDS = frozenset(
    ("model", "mode", "tenant_id", "ttft_s", "cheap", "strong", "cost_target", "dry_run")
)
# The first token is wanted within this time, unless somebody says otherwise.
TTFT_S = 2.0
Ttft = Annotated[float, Field(gt=0, le=600)]
ENGINE_ON_GPU, ENGINE_ON_CPU = "vllm", "transformers"


class Strict(BaseModel):
    """Bodies of our own API refuse unknown fields: a typo must not pass silently."""

    model_config = ConfigDict(extra="forbid")


class NewOrder(Strict):
    """GPUs wanted for a model; ``order_id`` makes it safe to repeat.

    ``gpus`` is a number of whole GPUs or a share such as 0.5; ``term`` like ``30d`` or ``12h``;
    ``max_price`` per GPU-hour.
    """

    model: str
    gpus: str = "1"
    term: str = "1h"
    start: str | None = None
    engine: str | None = None
    gpu_type: str | None = None
    gpu_memory_gib: Annotated[int, Field(ge=1)] | None = None
    max_price: str | None = None
    region: str | None = None
    provider_id: str | None = None
    resale: bool = False
    tenant_id: str | None = None
    order_id: Annotated[str, Field(min_length=1, max_length=100)] = Field(
        default_factory=lambda: f"order-{uuid.uuid4().hex[:16]}"
    )


class NewDeployment(NewOrder):
    """Body of ``POST /deployments``: tokens for everybody, or a lease, hybrid or auto for a tenant.

    ``replicas`` is a number or "MIN:MAX"; those above MIN stay while they are used and for
    ``keep_alive`` ("10m"; default: by break-even), and all of them together cost at most
    ``max_spend`` an hour. ``queue``: an order for a lease that fits nowhere waits instead of being
    refused. A hybrid spills for at most ``spill_budget`` a day, when the first token would take
    longer than ``ttft_s``. An auto deployment of two models is a name of the tenant's own.
    """

    mode: str = "tokens"
    spill_budget: str | None = None
    ttft_s: Ttft | None = None
    cheap: str | None = None
    strong: str | None = None
    cost_target: Annotated[float, Field(gt=0, le=1)] | None = None
    replicas: int | str | None = None
    keep_alive: str | None = None
    max_spend: str | None = None
    queue: bool = False
    dry_run: bool = False


class NodeFacts(Strict):
    """A node as it describes itself. ``ask`` is per GPU-hour."""

    node_id: str
    provider_id: str
    gpu_type: str
    gpus: list[Gpu]
    cpu_count: Annotated[int, Field(ge=1)]
    memory_mib: Annotated[int, Field(ge=1)]
    ask: str
    region: str = "local"
    logical: bool = False
    models_dir: str = ""
    available_from: str | None = None
    available_until: str | None = None
    term_min: str | None = None
    term_max: str | None = None


class NewNode(Strict):
    """Body of ``POST /nodes``: the first time with a join token, later with the node's key."""

    node: NodeFacts
    join_token: str | None = None
    node_id: str | None = None
    node_key: str | None = None


class Leaving(Strict):
    """Body of ``POST /nodes/{id}/leave``. The node itself shows its key."""

    force: bool = False
    node_key: str | None = None


class Renewal(Strict):
    """Body of ``POST /leases/{id}/renew``."""

    term: str


class LeaseChange(Strict):
    """Body of ``PATCH /leases/{id}``: what is left out stays; no ``spill_budget`` is any."""

    spill_budget: str | None = None
    ttft_s: Ttft = TTFT_S
    resale: bool = False


# -- supply ----------------------------------------------------------------------------------


@router.get("/offers")
async def offers(services: With, _caller: Caller) -> list[dict[str, Any]]:
    """What providers offer, and how much of each GPU is taken."""
    return await _offers(services)


@router.post("/providers/{provider_id}/join-tokens")
async def make_join_token(provider_id: str, services: With, caller: Caller) -> dict[str, str]:
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
    offer = _offer_of(body.node, services)
    key = await services.scheduler.join(offer, Proof(body.join_token, body.node_key))
    address, token = services.ray_access()
    return {
        "node_id": offer.node_id,
        "node_key": key,
        "ray_address": address,
        "ray_token": token,
    }


@router.post("/nodes/{node_id}/drain")
async def drain(node_id: str, services: With, caller: Caller, back: bool = False) -> dict[str, Any]:
    """Match nothing more with a node (``back``: do again); what runs there runs on."""
    await _require_own_node(services, caller, node_id)
    offer = await services.scheduler.drain(node_id, back)
    return await _offer_row(services, offer.offer_id)


@router.post("/nodes/{node_id}/leave")
async def leave(node_id: str, body: Leaving, services: With, request: Request) -> dict[str, Any]:
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
    if body.mode not in set(Mode):
        raise InvalidRequest(f"mode {body.mode!r} is unknown; use {', '.join(Mode)}", param="mode")
    policy = _policy(body)
    if body.mode in (Mode.LEASE, Mode.HYBRID):
        return await _lease(body, policy, services, caller)
    if body.mode == Mode.AUTO:
        assert policy is not None
        tenant_id = _for_tenant(body, caller)
        made = await services.scheduler.open_auto(body.model, tenant_id, policy, body.dry_run)
        return deployment_row(made, ())
    require_operator(caller)
    bounds = _bounds(body)
    found = await services.scheduler.open_pool(body.model, body.engine, bounds, body.dry_run)
    return deployment_row(*found)


@router.post("/quotes")
async def quote(body: NewOrder, services: With, caller: Caller) -> dict[str, Any]:
    """What an order would get right now: place, price, what would be held; or why not."""
    order = _order(body, services, caller)
    return quote_row(order, await services.scheduler.quote(order))


@router.get("/deployments")
async def deployments(services: With, caller: Caller) -> list[dict[str, Any]]:
    """What should run, and its state. Tenants see pools and their own."""
    tenant_id = _tenant_of(caller)
    reasons = await services.scheduler.scaling()
    return [
        deployment_row(deployment, replicas)
        | {"scaling": reasons.get(deployment.deployment_id, "")}
        for deployment, replicas in await services.scheduler.deployments()
        if tenant_id is None or deployment.tenant_id in (None, tenant_id)
    ]


@router.delete("/deployments/{name}")
async def undeploy(name: str, services: With, caller: Caller) -> dict[str, Any]:
    """Drain and remove a deployment, named by model or id; a lease's is released."""
    tenant_id = _tenant_of(caller)
    deployment = await services.scheduler.undeploy(name, tenant_id)
    return deployment_row(deployment, ())


@router.get("/orders")
async def orders(services: With, caller: Caller) -> list[dict[str, Any]]:
    """Orders that wait and orders lately refused, each with its reason."""
    return [order_row(order) for order in await services.scheduler.orders(_tenant_of(caller))]


@router.delete("/orders/{order_id}")
async def cancel_order(order_id: str, services: With, caller: Caller) -> dict[str, Any]:
    """Take a waiting order back."""
    order = await services.scheduler.cancel_order(order_id, _tenant_of(caller))
    return order_row(order)


@router.get("/leases")
async def list_leases(services: With, caller: Caller, closed: bool = False) -> list[dict[str, Any]]:
    """Leases: a tenant's own, those on a provider's nodes, or all."""
    found = await services.scheduler.leases(_tenant_of(caller), closed)
    return [lease_row(lease) for lease in found if _may_see(caller, lease)]


@router.get("/leases/{lease_id}")
async def show_lease(lease_id: str, services: With, caller: Caller) -> dict[str, Any]:
    """One lease."""
    lease = await services.scheduler.lease(lease_id, _tenant_of(caller))
    if not _may_see(caller, lease):
        raise PermissionDenied(f"this key may not see lease {lease_id}")
    return lease_row(lease)


@router.post("/leases/{lease_id}/renew")
async def renew(lease_id: str, body: Renewal, services: With, caller: Caller) -> dict[str, Any]:
    """Let a lease last longer, at its price."""
    tenant_id = _holder(caller)
    lease = await services.scheduler.renew(lease_id, parse_term(body.term), tenant_id)
    return lease_row(lease)


@router.patch("/leases/{lease_id}")
async def change_lease(
    lease_id: str, body: LeaseChange, services: With, caller: Caller
) -> dict[str, Any]:
    """Sell its idle time or not; change how a hybrid spills, from the next request on."""
    asked = body.model_fields_set
    policy: dict[str, Any] = {}
    if "spill_budget" in asked:
        policy["spill_pico"] = _limit(body.spill_budget, "spill_budget")
    if "ttft_s" in asked:
        policy["ttft_s"] = body.ttft_s
    resale = body.resale if "resale" in asked else None
    changed = await services.scheduler.change_lease(lease_id, resale, policy, _holder(caller))
    deployments = [deployment for deployment, _ in await services.scheduler.deployments()]
    policies = [d.policy for d in deployments if d.lease_id == lease_id]
    return lease_row(changed) | {"policy": _policy_row(next(iter(policies), None))}


@router.post("/leases/{lease_id}/release")
async def release(lease_id: str, services: With, caller: Caller) -> dict[str, Any]:
    """End a lease now: nothing more is charged."""
    return lease_row(await services.scheduler.release(lease_id, _holder(caller)))


# -- from words to values --------------------------------------------------------------------


async def _lease(
    body: NewDeployment, policy: LanePolicy | None, services: Services, caller: Principal
) -> dict[str, Any]:
    order = replace(_order(body, services, caller), policy=policy)
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


def _bounds(body: NewDeployment) -> Bounds:
    """How many replicas a pool may have. Raises InvalidRequest."""
    least, _, most = str(1 if body.replicas is None else body.replicas).partition(":")
    try:
        minimum, maximum = int(least), int(most or least)
    except ValueError:
        raise InvalidRequest(
            f"replicas: a number, or MIN:MAX like 0:4, got {body.replicas!r}", param="replicas"
        ) from None
    return Bounds(
        minimum,
        maximum,
        _limit(body.max_spend, "max_spend"),
        None if body.keep_alive is None else float(parse_term(body.keep_alive, "keep_alive")),
    )


def _policy(body: NewDeployment) -> LanePolicy | None:
    """How lanes are chosen; None where there is nothing to choose. Raises InvalidRequest."""
    modes = {
        "spill_budget": (Mode.HYBRID,),
        "ttft_s": (Mode.HYBRID, Mode.AUTO),
        **dict.fromkeys(("cheap", "strong", "cost_target"), (Mode.AUTO,)),
    }
    if body.mode == Mode.AUTO:
        wrong = body.model_fields_set - AUTO_FIELDS
        if wrong:
            raise InvalidRequest(f"{min(wrong)} is not for mode auto", param=min(wrong))
    for name, allowed in modes.items():
        if getattr(body, name) is not None and body.mode not in allowed:
            raise InvalidRequest(f"{name} is for mode {' and '.join(allowed)} only", param=name)
    if body.mode not in (Mode.HYBRID, Mode.AUTO):
        return None
    given: dict[str, Any] = {
        "ttft_s": body.ttft_s or TTFT_S,
        "spill_pico": _limit(body.spill_budget, "spill_budget"),
        "cheap": body.cheap or "",
        "strong": body.strong or "",
    }
    if body.cost_target is not None:
        given["cost_target"] = body.cost_target
    return LanePolicy(**given)


def _limit(text: str | None, what: str) -> int | None:
    """An amount that is a limit; None for none. Raises InvalidRequest."""
    if text is None:
        return None
    pico = pricing.parse_money(text, what)
    if pico < 0:
        raise InvalidRequest(f"{what}: a limit cannot be negative, got {text}", param=what)
    return pico


def _for_tenant(body: NewOrder, caller: Principal) -> str:
    """For whom it is. Raises InvalidRequest, PermissionDenied."""
    if caller.role is Role.PROVIDER:
        raise PermissionDenied("a provider's key cannot deploy")
    tenant_id = _tenant_of(caller) or body.tenant_id
    if tenant_id is None:
        raise InvalidRequest("tenant_id: say for whom it is (--tenant NAME)")
    if body.tenant_id not in (None, tenant_id):
        raise PermissionDenied(f"this key may not order for tenant {body.tenant_id}")
    return tenant_id


def _order(body: NewOrder, services: Services, caller: Principal) -> Order:
    now = services.clock.now()
    tenant_id = _for_tenant(body, caller)
    count, milli = parse_gpus(body.gpus)
    model = catalog.find(body.model)
    small = model.runs_on_cpu or model.embeds
    return Order(
        order_id=body.order_id,
        tenant_id=tenant_id,
        api_key_id=caller.api_key_id,
        model=model.name,
        engine=body.engine or (ENGINE_ON_CPU if small else ENGINE_ON_GPU),
        gpu_count=count,
        gpu_milli=milli,
        start=None if body.start is None else parse_moment(body.start, now, "start"),
        term_s=parse_term(body.term),
        created_at=now,
        gpu_type=body.gpu_type,
        gpu_memory_mib=None if body.gpu_memory_gib is None else body.gpu_memory_gib * 1024,
        max_price_pico=_limit(body.max_price, "max_price"),
        region=body.region,
        provider_id=body.provider_id,
        resale=body.resale,
    )


def parse_gpus(text: str) -> tuple[int, int]:
    """``2`` -> (2, 1000), ``0.5`` -> (1, 500). Raises InvalidRequest."""
    try:
        amount = Decimal(text)
        milli = int(amount * 1000)
        exact = amount.is_finite() and milli == amount * 1000 and milli > 0
    except (InvalidOperation, ValueError, OverflowError):
        exact, milli = False, 0
    if not exact or (milli > 1000 and milli % 1000):
        raise InvalidRequest(
            f"gpus: {text!r}: a number of whole GPUs, or a share of one such as 0.5 (thousandths)",
            param="gpus",
        )
    return (1, milli) if milli < 1000 else (milli // 1000, 1000)


def parse_term(text: str, what: str = "term") -> int:
    """``30d``, ``12h``, ``1d12h``, ``90s`` as seconds. Raises InvalidRequest."""
    parts = re.findall(r"(\d+)([smhdw])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise InvalidRequest(f"{what}: {text!r} is no duration such as 30d, 12h or 90m", param=what)
    return sum(int(number) * TERM_UNITS_S[unit] for number, unit in parts)


def parse_moment(text: str, now: datetime, what: str) -> datetime:
    """An ISO time with a zone (UTC if it has none), or a duration from now. InvalidRequest."""
    with contextlib.suppress(InvalidRequest):
        return now + timedelta(seconds=parse_term(text))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(
            f"{what}: {text!r} is no time such as 2026-12-01T08:00Z, nor a duration such as 2h",
            param=what,
        ) from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _offer_of(node: NodeFacts, services: Services) -> Offer:
    now = services.clock.now()

    def when(text: str | None, what: str) -> Any:
        return None if text is None else parse_moment(text, now, what)

    return Offer(
        offer_id=node.node_id,
        provider_id=node.provider_id,
        node_id=node.node_id,
        gpu_type=node.gpu_type,
        gpus=tuple(node.gpus),
        cpu_count=node.cpu_count,
        memory_mib=node.memory_mib,
        ask_pico=pricing.parse_money(node.ask, "ask"),
        currency=CURRENCY,
        priced_at=now,
        region=node.region,
        logical=node.logical,
        models_dir=node.models_dir,
        available_from=when(node.available_from, "available_from"),
        available_until=when(node.available_until, "available_until"),
        term_min_s=0 if node.term_min is None else parse_term(node.term_min),
        term_max_s=TERM_MAX_S if node.term_max is None else parse_term(node.term_max),
    )


# -- who may what ----------------------------------------------------------------------------


def _tenant_of(caller: Principal) -> str | None:
    """Whose things the caller sees; None: everybody's."""
    return caller.subject_id if caller.role is Role.TENANT else None


def _holder(caller: Principal) -> str | None:
    """Like ``_tenant_of``, for what a provider may not do. Raises PermissionDenied."""
    if caller.role is Role.PROVIDER:
        raise PermissionDenied("a provider's key cannot change leases")
    return _tenant_of(caller)


def _may_see(caller: Principal, lease: Lease) -> bool:
    return caller.role is not Role.PROVIDER or lease.provider_id == caller.subject_id


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
