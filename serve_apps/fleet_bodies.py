"""Bodies of the fleet's API, and the values that they stand for."""

import re
import uuid
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any

from pydantic import Field

from market import pricing, when
from market.catalog import Model
from market.errors import InvalidRequest
from market.types import (
    CURRENCY,
    MODE_FIELDS,
    TERM_MAX_S,
    Bounds,
    Gpu,
    LanePolicy,
    Mode,
    Offer,
    Order,
)
from serve_apps.http import Count, Name, Strict, Words

# Fields of a deployment that every mode has a use for.
ALWAYS = frozenset(("model", "mode", "dry_run"))
# The first token is wanted within this time, unless somebody says otherwise.
TTFT_S = 2.0
Ttft = Annotated[float, Field(gt=0, le=600)]
ENGINE_ON_GPU, ENGINE_ON_CPU = "vllm", "transformers"
GIB_MAX = 2**20
GPUS_MAX = 256
_GPUS = re.compile(r"[0-9]{1,6}|[0-9]{0,6}\.[0-9]{1,9}")
_REPLICAS = re.compile(r"([0-9]{1,6})(?::([0-9]{1,6}))?")


class NewOrder(Strict):
    """GPUs wanted for a model; ``order_id`` makes it safe to repeat.

    ``gpus`` is a number of whole GPUs or a share such as 0.5; ``term`` like ``30d`` or ``12h``;
    ``max_price`` per GPU-hour.
    """

    model: Name
    gpus: Name = "1"
    term: Name = "1h"
    start: Name | None = None
    engine: Name | None = None
    gpu_type: Name | None = None
    gpu_memory_gib: Annotated[int, Field(ge=1, le=GIB_MAX)] | None = None
    max_price: Name | None = None
    region: Name | None = None
    provider_id: Name | None = None
    resale: bool = False
    tenant_id: Name | None = None
    order_id: Name = Field(default_factory=lambda: f"order-{uuid.uuid4().hex[:16]}")


class NewDeployment(NewOrder):
    """Body of ``POST /deployments``: tokens for everybody, or a lease, hybrid or auto for a tenant.

    ``replicas`` is a number or "MIN:MAX"; those above MIN stay while they are used and for
    ``keep_alive`` ("10m"; default: by break-even), and all of them together cost at most
    ``max_spend`` an hour. ``queue``: an order for a lease that fits nowhere waits instead of being
    refused. A hybrid spills for at most ``spill_budget`` a day, when the first token would take
    longer than ``ttft_s``. An auto deployment of two models is a name of the tenant's own.
    """

    mode: Mode = Mode.TOKENS
    spill_budget: Name | None = None
    ttft_s: Ttft | None = None
    cheap: Name | None = None
    strong: Name | None = None
    cost_target: Annotated[float, Field(gt=0, le=1)] | None = None
    replicas: int | Name | None = None
    keep_alive: Name | None = None
    max_spend: Name | None = None
    queue: bool = False
    dry_run: bool = False


class GpuFacts(Strict):
    """One physical GPU of a node."""

    index: Count
    gpu_type: Name
    memory_mib: Count
    domain: Count = 0


class NodeFacts(Strict):
    """A node as it describes itself. ``ask`` is per GPU-hour."""

    node_id: Name
    provider_id: Name
    gpu_type: Name
    gpus: Annotated[list[GpuFacts], Field(max_length=GPUS_MAX)]
    cpu_count: Annotated[Count, Field(ge=1)]
    memory_mib: Annotated[Count, Field(ge=1)]
    ask: Name
    region: Name = "local"
    logical: bool = False
    models_dir: Words = ""
    available_from: Name | None = None
    available_until: Name | None = None
    term_min: Name | None = None
    term_max: Name | None = None


class NewNode(Strict):
    """Body of ``POST /nodes``: the first time with a join token, later with the node's key."""

    node: NodeFacts
    join_token: Name | None = None
    node_id: Name | None = None
    node_key: Name | None = None


class Leaving(Strict):
    """Body of ``POST /nodes/{id}/leave``. The node itself shows its key."""

    force: bool = False
    node_key: Name | None = None


class Renewal(Strict):
    """Body of ``POST /leases/{id}/renew``."""

    term: Name


class LeaseChange(Strict):
    """Body of ``PATCH /leases/{id}``: what is left out stays; no ``spill_budget`` is any."""

    spill_budget: Name | None = None
    ttft_s: Ttft = TTFT_S
    resale: bool = False


def bounds_of(body: NewDeployment) -> Bounds:
    """How many replicas a pool may have. Raises InvalidRequest."""
    asked = _REPLICAS.fullmatch(str(1 if body.replicas is None else body.replicas))
    if asked is None:
        raise InvalidRequest("replicas: a number, or MIN:MAX like 0:4", param="replicas")
    return Bounds(
        int(asked[1]),
        int(asked[2] or asked[1]),
        limit_of(body.max_spend, "max_spend"),
        None if body.keep_alive is None else float(when.duration(body.keep_alive, "keep_alive")),
    )


def require_used(body: NewDeployment) -> None:
    """Raises InvalidRequest for a field that the mode has no use for: it would say nothing."""
    asked = {name: getattr(body, name) for name in body.model_fields_set - ALWAYS}
    said = {name for name, value in asked.items() if value is not None and value is not False}
    for name in sorted(said - MODE_FIELDS[body.mode]):
        modes = " and ".join(mode for mode, names in MODE_FIELDS.items() if name in names)
        given = "" if "mode" in body.model_fields_set else ", as none was said"
        raise InvalidRequest(
            f"{name} is for mode {modes} only; the mode is {body.mode}{given}", param=name
        )


def policy_of(body: NewDeployment) -> LanePolicy | None:
    """How lanes are chosen; None where there is nothing to choose. Raises InvalidRequest."""
    if body.mode not in (Mode.HYBRID, Mode.AUTO):
        return None
    given: dict[str, Any] = {
        "ttft_s": body.ttft_s or TTFT_S,
        "spill_pico": limit_of(body.spill_budget, "spill_budget"),
        "cheap": body.cheap or "",
        "strong": body.strong or "",
    }
    if body.cost_target is not None:
        given["cost_target"] = body.cost_target
    return LanePolicy(**given)


def limit_of(text: str | None, what: str) -> int | None:
    """An amount that is a limit; None for none. Raises InvalidRequest."""
    if text is None:
        return None
    pico = pricing.parse_money(text, what)
    if pico < 0:
        raise InvalidRequest(f"{what}: a limit cannot be negative, got {text}", param=what)
    return pico


def order_of(body: NewOrder, model: Model, tenant_id: str, api_key_id: str, now: datetime) -> Order:
    """The order that a tenant's key or the operator gives for it. Raises InvalidRequest."""
    count, milli = parse_gpus(body.gpus)
    small = model.runs_on_cpu or model.embeds
    return Order(
        order_id=body.order_id,
        tenant_id=tenant_id,
        api_key_id=api_key_id,
        model=model.name,
        engine=body.engine or (ENGINE_ON_CPU if small else ENGINE_ON_GPU),
        gpu_count=count,
        gpu_milli=milli,
        start=_moment(body.start, now, "start"),
        term_s=when.duration(body.term, "term"),
        created_at=now,
        gpu_type=body.gpu_type,
        gpu_memory_mib=None if body.gpu_memory_gib is None else body.gpu_memory_gib * 1024,
        max_price_pico=limit_of(body.max_price, "max_price"),
        region=body.region,
        provider_id=body.provider_id,
        resale=body.resale,
    )


def offer_of(node: NodeFacts, now: datetime) -> Offer:
    """What a node offers. Raises InvalidRequest."""
    longest = node.term_max
    return Offer(
        offer_id=node.node_id,
        provider_id=node.provider_id,
        node_id=node.node_id,
        gpu_type=node.gpu_type,
        gpus=tuple(Gpu(**gpu.model_dump()) for gpu in node.gpus),
        cpu_count=node.cpu_count,
        memory_mib=node.memory_mib,
        ask_pico=pricing.parse_money(node.ask, "ask"),
        currency=CURRENCY,
        priced_at=now,
        region=node.region,
        logical=node.logical,
        models_dir=node.models_dir,
        available_from=_moment(node.available_from, now, "available_from"),
        available_until=_moment(node.available_until, now, "available_until"),
        term_min_s=0 if node.term_min is None else when.duration(node.term_min, "term_min"),
        term_max_s=TERM_MAX_S if longest is None else when.duration(longest, "term_max"),
    )


def parse_gpus(text: str) -> tuple[int, int]:
    """``2`` -> (2, 1000), ``0.5`` -> (1, 500). Raises InvalidRequest."""
    milli = Decimal(text) * 1000 if _GPUS.fullmatch(text) else Decimal(0)
    if not milli or milli % 1 or (milli > 1000 and milli % 1000):
        raise InvalidRequest(
            f"gpus: {text[:40]!r}: a number of whole GPUs, or a share of one such as 0.5 "
            "(thousandths)",
            param="gpus",
        )
    return (1, int(milli)) if milli < 1000 else (int(milli) // 1000, 1000)


def _moment(text: str | None, now: datetime, what: str) -> datetime | None:
    return None if text is None else when.moment(text, now, what)
