"""``/market/v1/keys``: API keys, what they may do and spend."""

from datetime import timedelta
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from pydantic import Field

from market import when
from market.errors import InvalidRequest, PermissionDenied
from market.keys import hash_key, key_id, new_key
from market.types import KeyPolicy, Lane, Period, Principal, Role
from serve_apps.auth import require_operator
from serve_apps.http import Caller, Name, Services, Strict, With
from serve_apps.market_api import parse_budgets

router = APIRouter(prefix="/market/v1")

OVERLAP_MAX = timedelta(days=90)
Limit = Annotated[int, Field(ge=1, le=10**12)]
# A key may not be refused what makes it unlimited again: null says so.
LIMITS = ("requests_per_min", "tokens_per_min", "concurrent")


class Policy(Strict):
    """What a key may do; what is left out is not limited, or stays as it is."""

    models: Annotated[list[Name], Field(max_length=100)] | None = None
    lanes: Annotated[list[Lane], Field(max_length=len(Lane))] | None = None
    read_only: bool | None = None
    expires: Name | None = None
    requests_per_min: Limit | None = None
    tokens_per_min: Limit | None = None
    concurrent: Limit | None = None
    budgets: dict[Period, Name | None] | None = None


class NewKey(Policy):
    """Body of ``POST /keys``: a key for a tenant, a provider, or the operator."""

    tenant_id: Name | None = None
    provider_id: Name | None = None
    operator: bool = False


class Rotation(Strict):
    """Body of ``POST /keys/{id}/rotate``: for how long the old secret works on."""

    overlap: Name = "24h"


@router.post("/keys")
async def create_key(body: NewKey, services: With, caller: Caller) -> dict[str, Any]:
    """Make an API key. The secret is in this answer and nowhere else."""
    require_operator(caller)
    subjects = [
        (Role.TENANT, body.tenant_id),
        (Role.PROVIDER, body.provider_id),
        (Role.OPERATOR, "operator" if body.operator else None),
    ]
    named = [(role, name) for role, name in subjects if name is not None]
    if len(named) != 1:
        raise InvalidRequest(
            "tenant_id, provider_id or operator: say for whom the key is, one of them"
        )
    (role, subject_id) = named[0]
    if body.budgets and role is not Role.TENANT:
        raise InvalidRequest("budgets: only tenants spend money", param="budgets")
    secret = new_key()
    policy = await _policy(body, KeyPolicy(), services)
    principal = Principal(key_id(secret), role, subject_id, policy)
    limits = parse_budgets(body.budgets or {})
    await services.ledger.add_key(principal, hash_key(secret))
    if limits:
        await services.ledger.set_budgets(principal.api_key_id, limits)
    return {"api_key_id": principal.api_key_id, f"{role}_id": subject_id, "api_key": secret}


@router.get("/keys")
async def list_keys(services: With, caller: Caller) -> list[dict[str, Any]]:
    """Keys without their secrets."""
    owner = None if caller.role is Role.OPERATOR else (caller.role, caller.subject_id)
    rows = await services.ledger.keys(owner)
    return [
        {**row, "budgets": await services.ledger.budget_rows(row["api_key_id"])} for row in rows
    ]


@router.patch("/keys/{api_key_id}")
async def change_key(
    api_key_id: Name, body: Policy, services: With, caller: Caller
) -> dict[str, Any]:
    """Change what a key may do; what is left out stays, null lifts a limit."""
    require_operator(caller)
    key = await services.ledger.key(api_key_id)
    if body.budgets and key.role is not Role.TENANT:
        raise InvalidRequest("budgets: only tenants spend money", param="budgets")
    policy = await _policy(body, key.policy, services)
    limits = parse_budgets(body.budgets or {})
    await services.ledger.set_policy(api_key_id, policy)
    if limits:
        await services.ledger.set_budgets(api_key_id, limits)
    return {
        "api_key_id": api_key_id,
        "subject_id": key.subject_id,
        "policy": msgspec.to_builtins(policy),
        "budgets": await services.ledger.budget_rows(api_key_id),
    }


@router.post("/keys/{api_key_id}/rotate")
async def rotate_key(
    api_key_id: Name, body: Rotation, services: With, caller: Caller
) -> dict[str, Any]:
    """Give a key a new secret; the old one works on for a while. Keys may rotate themselves."""
    if caller.role is not Role.OPERATOR and caller.api_key_id != api_key_id:
        raise PermissionDenied("a key may rotate itself only; others need an operator key")
    if caller.secret_until is not None:  # who has only the old one is whom it is taken from
        raise PermissionDenied("this is the key's old secret; rotate it with the new one")
    seconds = 0 if body.overlap == "0" else when.duration(body.overlap, "overlap")
    overlap = timedelta(seconds=seconds)
    if overlap > OVERLAP_MAX:
        raise InvalidRequest(f"overlap: at most {OVERLAP_MAX.days}d", param="overlap")
    secret = new_key()
    until = await services.ledger.rotate_key(api_key_id, hash_key(secret), overlap)
    return {
        "api_key_id": api_key_id,
        "api_key": secret,
        "old_secret_until": until.isoformat(),
    }


@router.delete("/keys/{api_key_id}")
async def revoke_key(api_key_id: Name, services: With, caller: Caller) -> dict[str, str]:
    """End a key; gateways refuse it within five seconds."""
    require_operator(caller)
    await services.ledger.revoke_key(api_key_id)
    return {"api_key_id": api_key_id, "state": "revoked"}


async def _policy(body: Policy, known: KeyPolicy, services: Services) -> KeyPolicy:
    given = body.model_fields_set
    changes: dict[str, Any] = {name: getattr(body, name) for name in given & set(LIMITS)}
    if "models" in given:
        for model in body.models or ():
            await services.scheduler.model(model)
        changes["models"] = None if body.models is None else tuple(body.models)
    if "lanes" in given:
        changes["lanes"] = None if body.lanes is None else tuple(body.lanes)
    if "read_only" in given:
        changes["read_only"] = bool(body.read_only)
    if "expires" in given:
        now, text = services.clock.now(), body.expires
        changes["expires_at"] = None if text is None else when.moment(text, now, "expires")
    return msgspec.structs.replace(known, **changes)
