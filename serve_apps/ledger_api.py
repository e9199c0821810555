"""``/market/v1``: usage, requests, refunds, settlement, statements, proofs; and ``/v1/usage``."""

import uuid
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field

from market import pricing, when
from market.errors import InvalidRequest, PermissionDenied
from market.ledger.refunds import Refund
from market.ledger.reports import BUCKETS, BUCKETS_MAX, UsageQuery
from market.ledger.statement import Party
from market.metering import LENT_BY
from market.types import CURRENCY, SHARED, Principal, Role
from serve_apps.auth import require_operator, require_provider, require_tenant
from serve_apps.http import Caller, LongCount, Name, Strict, With, Words

router = APIRouter()

OWN = "/market/v1"
SECONDS_MAX = 10**11  # far beyond any year that a datetime has to bear
ARROW_STREAM = "application/vnd.apache.arrow.stream"
MEDIA_TYPES = {
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "parquet": "application/vnd.apache.parquet",
}


class NewRefund(Strict):
    """Body of ``POST /tenants/{id}/refunds``; ``refund_id`` makes it safe to repeat."""

    reason: Annotated[Words, Field(min_length=1)]
    request_id: Name | None = None
    amount: Name | None = None
    provider_id: Name | None = None
    refund_id: Name = Field(default_factory=lambda: uuid.uuid4().hex)


class NewSettlement(Strict):
    """Body of ``POST /settlements``."""

    period: Name
    dry_run: bool = False


@router.get(f"{OWN}/usage")
async def usage(
    services: With,
    caller: Caller,
    by: Annotated[Words, Query()] = "model",
    tenant: Annotated[Name | None, Query()] = None,
    model: Annotated[Name | None, Query()] = None,
    since: Annotated[Name | None, Query()] = None,
    until: Annotated[Name | None, Query()] = None,
) -> list[dict[str, Any]]:
    """Requests, tokens, GPU time and charges per group, of every booked row."""
    now = services.clock.now()
    query = UsageQuery(
        by=tuple(part.strip() for part in by.split(",") if part.strip()),
        tenant=require_tenant(caller, tenant),
        model=model,
        since=None if since is None else when.moment(since, now, "since", past=True),
        until=None if until is None else when.moment(until, now, "until", past=True),
        lenders=caller.role is Role.OPERATOR,
    )
    return [_plain(row) for row in await services.ledger.usage(query)]


@router.get("/v1/usage")
async def usage_buckets(
    services: With,
    caller: Caller,
    start_time: Annotated[int, Query(ge=0, le=SECONDS_MAX)],
    end_time: Annotated[int | None, Query(ge=0, le=SECONDS_MAX)] = None,
    bucket_width: Annotated[Name, Query()] = "1d",
    group_by: Annotated[list[Name] | None, Query()] = None,
    models: Annotated[list[Name] | None, Query()] = None,
) -> dict[str, Any]:
    """Usage per time bucket, in the shape of OpenAI's usage API; times are Unix seconds."""
    groups = group_by or []
    if bucket_width not in BUCKETS:
        raise InvalidRequest(f"bucket_width {bucket_width!r}: choose from {', '.join(BUCKETS)}")
    if models is not None and len(models) != 1:
        raise InvalidRequest("models: ask for one model at a time, or group_by=model")
    step = BUCKETS[bucket_width]
    first = start_time // step * step
    end = int(services.clock.now().timestamp()) + 1 if end_time is None else end_time
    if not first < end <= first + step * BUCKETS_MAX:
        raise InvalidRequest(
            f"start_time to end_time must be 1 to {BUCKETS_MAX} buckets of {bucket_width}"
        )
    query = UsageQuery(
        by=(),
        tenant=require_tenant(caller),
        model=models[0] if models else None,
        since=datetime.fromtimestamp(start_time, UTC),
        until=datetime.fromtimestamp(end, UTC),
    )
    rows = await services.ledger.usage_buckets(query, bucket_width, groups)
    results: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        results.setdefault(row["start_time"], []).append(_bucket_result(row, groups))
    data = [
        {
            "object": "bucket",
            "start_time": start,
            "end_time": start + step,
            "results": results.get(start, []),
        }
        for start in range(first, end, step)
    ]
    return {"object": "page", "data": data, "has_more": False, "next_page": None}


def _bucket_result(row: dict[str, Any], groups: list[str]) -> dict[str, Any]:
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": row["input_tokens"],
        "input_cached_tokens": row["cached_input_tokens"],
        "input_uncached_tokens": row["input_tokens"] - row["cached_input_tokens"],
        "output_tokens": row["output_tokens"],
        "num_model_requests": row["requests"],
        "cost": {"value": format(row["charge"], "f"), "currency": row["currency"].lower()},
        **{name: row.get(name) for name in ("project_id", "api_key_id", "model")},
        "user_id": None,
    }


@router.get(f"{OWN}/requests/{{request_id}}")
async def request(request_id: Name, services: With, caller: Caller) -> dict[str, Any]:
    """What a request used and cost, and what was given back of it."""
    rows = await services.ledger.request(request_id)
    require_tenant(caller, rows[0]["tenant_id"])
    charge = sum((row["charge"] for row in rows), Decimal(0))
    own, *corrections = (_plain(_seen(caller, row)) for row in rows)
    return {
        **own,
        "charge_after_corrections": format(charge, "f"),
        "corrections": corrections,
    }


@router.post(f"{OWN}/tenants/{{tenant_id}}/refunds")
async def refund(
    tenant_id: Name, body: NewRefund, services: With, caller: Caller
) -> dict[str, Any]:
    """Give money back: a request, part of it, or an adjustment; a new row says who and why."""
    require_operator(caller)
    amount = None if body.amount is None else pricing.parse_money(body.amount)
    await services.ledger.balance(tenant_id)
    booked = await services.ledger.refund(
        Refund(
            refund_id=body.refund_id,
            tenant_id=tenant_id,
            reason=body.reason,
            made_by=caller.api_key_id,
            request_id=body.request_id,
            amount_pico=amount,
            provider_id=body.provider_id,
        )
    )
    balance = await services.ledger.balance(tenant_id)
    return {
        "tenant_id": tenant_id,
        **booked,
        "balance": pricing.format_money(balance.balance_pico),
        "currency": CURRENCY,
    }


@router.post(f"{OWN}/settlements")
async def settle(body: NewSettlement, services: With, caller: Caller) -> dict[str, Any]:
    """Close a month after verifying the ledger; with ``dry_run`` show what it would be."""
    require_operator(caller)
    return await services.ledger.settle(body.period, caller.api_key_id, body.dry_run)


@router.get(f"{OWN}/statements/{{party}}/{{name}}")
async def statement(
    party: Party,
    name: Name,
    services: With,
    caller: Caller,
    period: Annotated[Name, Query()],
    form: Annotated[Name, Query(alias="format")] = "json",
) -> Response:
    """What a tenant or provider had, used and paid in a month; json, csv or html."""
    (require_tenant if party is Party.TENANT else require_provider)(caller, name)
    text = await services.ledger.statement_as(party, name, period, form)
    return Response(text, media_type=MEDIA_TYPES[form])


@router.get(f"{OWN}/ledger/live")
async def live(
    services: With,
    caller: Caller,
    dataset: Annotated[Name, Query()] = "usage",
    after: Annotated[LongCount, Query()] = 0,
) -> Response:
    """Rows beyond number ``after`` as an Arrow stream: what a reader of the files lacks."""
    require_operator(caller)
    if dataset not in ("usage", "transfers"):
        raise InvalidRequest(f"there is no ledger {dataset!r}; choose usage or transfers")
    return Response(await services.ledger.live(dataset, after), media_type=ARROW_STREAM)


@router.get(f"{OWN}/ledger/focus")
async def focus(
    services: With,
    caller: Caller,
    period: Annotated[Name, Query()],
    version: Annotated[Name, Query()] = "1.2",
    form: Annotated[Name, Query(alias="format")] = "parquet",
    tenant: Annotated[Name | None, Query()] = None,
) -> Response:
    """A month in the FOCUS format, as a parquet or csv file."""
    if form not in ("parquet", "csv"):
        raise InvalidRequest(f"format {form!r} is not known; choose parquet or csv")
    own = require_tenant(caller, tenant)
    content = await services.ledger.focus(period, version, form, own)
    return Response(content, media_type=MEDIA_TYPES[form])


@router.post(f"{OWN}/ledger/verify")
async def verify(services: With, caller: Caller) -> dict[str, Any]:
    """Recompute everything; ``finding`` is null or the first thing that is wrong."""
    require_operator(caller)
    return await services.ledger.verify()


@router.post(f"{OWN}/ledger/compact")
async def compact(services: With, caller: Caller) -> dict[str, Any]:
    """Make each closed day one file."""
    require_operator(caller)
    return {"files": await services.ledger.compact()}


@router.get(f"{OWN}/ledger/checkpoint")
async def checkpoint(services: With, _caller: Caller) -> dict[str, str]:
    """A signed note of everything public: keep it, it proves that nothing was rewritten."""
    return {"checkpoint": await services.ledger.checkpoint()}


@router.get(f"{OWN}/ledger/proofs/{{request_id}}")
async def prove(
    request_id: Name,
    services: With,
    caller: Caller,
    size: Annotated[LongCount | None, Query(ge=1)] = None,
) -> dict[str, Any]:
    """That a request's row is in the ledger; scripts/verify_proof.py checks it."""
    rows = await services.ledger.request(request_id)
    require_tenant(caller, rows[0]["tenant_id"])
    if _seen(caller, rows[0]) != rows[0]:
        raise PermissionDenied(  # the row's digest is of all its columns, so none can be left out
            f"the row of {request_id} says on whose lease it was served: ask the operator for it",
            code="row_names_lender",
        )
    return await services.ledger.prove(request_id, size)


@router.get("/metrics")
async def metrics(services: With, caller: Caller) -> Response:
    """For Prometheus, with an operator's key (they say what the market earns)."""
    require_operator(caller)
    ledger, leases = await services.ledger.status(), await services.scheduler.leases()
    page = services.metrics.page(ledger, leases, services.clock.now())
    return Response(page, media_type=CONTENT_TYPE_LATEST)


def _seen(caller: Principal, row: dict[str, Any]) -> dict[str, Any]:
    """A row as the caller may see it: whose lease served a pool's request is the operator's."""
    if caller.role is Role.OPERATOR or row["lane"] not in SHARED or row["lease_id"] is None:
        return row
    attrs = {name: value for name, value in dict(row["attrs"] or {}).items() if name != LENT_BY}
    return row | {"lease_id": None, "attrs": attrs}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON: exact decimals and times as text."""
    plain: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Decimal):
            plain[name] = format(value, "f")
        elif isinstance(value, datetime):
            moment = value if value.tzinfo else value.replace(tzinfo=UTC)
            plain[name] = moment.astimezone(UTC).isoformat()
        elif name == "attrs":
            plain[name] = dict(value or {})
        elif value is None or isinstance(value, int | str | dict):
            plain[name] = value
        else:
            plain[name] = str(value)
    return plain
