"""``/market/v1``: what the CLI calls. Operators see everything, tenants themselves."""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from market import accounts, catalog, pricing
from market.accounts import Account, Transfer, TransferKind, tenant_account
from market.errors import InvalidRequest
from market.keys import hash_key, key_id, new_key
from market.ledger.reports import parse_when
from market.scheduler.service import deployment_state
from market.types import CURRENCY, Principal, Role
from serve_apps.auth import require_operator, require_subject
from serve_apps.http import Caller, With

router = APIRouter(prefix="/market/v1")


class Strict(BaseModel):
    """Bodies of our own API refuse unknown fields: a typo must not pass silently."""

    model_config = ConfigDict(extra="forbid")


class NewTenant(Strict):
    """Body of ``POST /tenants``."""

    tenant_id: str


class NewDeposit(Strict):
    """Body of ``POST /tenants/{id}/deposits``; ``deposit_id`` makes it safe to repeat."""

    amount: str
    deposit_id: Annotated[str, Field(min_length=1, max_length=100)]
    reason: Annotated[str, Field(max_length=500)] = "deposit"


class NewKey(Strict):
    """Body of ``POST /keys``: a key for a tenant or for a provider."""

    tenant_id: str | None = None
    provider_id: str | None = None


class NewProvider(Strict):
    """Body of ``POST /providers``."""

    provider_id: str


class NewPrice(Strict):
    """Body of ``POST /prices``, per million tokens; in force from ``valid_from`` on (now)."""

    model: str
    input_price: str
    output_price: str
    cached_input_price: str | None = None
    valid_from: str | None = None


@router.get("/models")
async def models(services: With, _caller: Caller) -> list[dict[str, Any]]:
    """The catalog with prices in force and whether a model is deployed."""
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
            **_prices(cards.get(model.name)),
        }
        for model in catalog.models()
    ]


@router.get("/prices")
async def prices(services: With, _caller: Caller) -> list[dict[str, Any]]:
    """Rate cards in force, per million tokens."""
    return [
        {"model": card.model, "price_id": card.price_id, **_prices(card)}
        for card in await services.ledger.rate_cards()
    ]


@router.get("/providers")
async def providers(services: With, caller: Caller) -> list[dict[str, str]]:
    """Who sells."""
    require_operator(caller)
    return [{"provider_id": name} for name in await services.ledger.providers()]


@router.post("/providers")
async def create_provider(body: NewProvider, services: With, caller: Caller) -> dict[str, Any]:
    """Make a provider with empty accounts; again is harmless."""
    require_operator(caller)
    created = await services.ledger.create_provider(body.provider_id)
    return {"created": created, "provider_id": body.provider_id}


@router.post("/prices")
async def set_price(body: NewPrice, services: With, caller: Caller) -> dict[str, Any]:
    """A new price: requests admitted from then on have it, those before keep theirs."""
    require_operator(caller)
    catalog.find(body.model)
    now = services.clock.now()
    prices = (
        pricing.parse_price(body.input_price, "input_price"),
        pricing.parse_price(body.cached_input_price or body.input_price, "cached_input_price"),
        pricing.parse_price(body.output_price, "output_price"),
    )
    start = now if body.valid_from is None else parse_when(body.valid_from, now, "valid_from")
    if start < now:
        raise InvalidRequest("valid_from: prices cannot change the past")
    card = pricing.make_rate_card(body.model, prices, start, CURRENCY)
    await services.ledger.add_rate_cards([card], only_new_models=False)
    return {
        "model": card.model,
        "price_id": card.price_id,
        **_prices(card),
        "valid_from": card.valid_from.isoformat(),
    }


@router.post("/tenants")
async def create_tenant(body: NewTenant, services: With, caller: Caller) -> dict[str, Any]:
    """Make a tenant with an empty account; again is harmless."""
    require_operator(caller)
    created = await services.ledger.create_tenant(body.tenant_id)
    balance = await services.ledger.balance(body.tenant_id)
    return {"created": created, **_tenant(body.tenant_id, balance)}


@router.get("/tenants")
async def list_tenants(services: With, caller: Caller) -> list[dict[str, Any]]:
    """All tenants with their balances."""
    require_operator(caller)
    prefix = tenant_account("")
    return [
        _tenant(account.account_id.removeprefix(prefix), account)
        for account in await services.ledger.accounts()
        if account.account_id.startswith(prefix)
    ]


@router.get("/tenants/{tenant_id}")
async def show_tenant(tenant_id: str, services: With, caller: Caller) -> dict[str, Any]:
    """One tenant's balance."""
    require_subject(caller, tenant_id)
    return _tenant(tenant_id, await services.ledger.balance(tenant_id))


@router.post("/tenants/{tenant_id}/deposits")
async def deposit(
    tenant_id: str, body: NewDeposit, services: With, caller: Caller
) -> dict[str, Any]:
    """Book money that a tenant paid in; the same ``deposit_id`` books once."""
    require_operator(caller)
    amount_pico = pricing.parse_money(body.amount)
    if amount_pico <= 0:
        raise InvalidRequest(f"amount: a deposit must be positive, got {body.amount}")
    await services.ledger.balance(tenant_id)
    await services.ledger.transfer(
        Transfer(
            transfer_id=f"deposit-{tenant_id}-{body.deposit_id}",
            kind=TransferKind.DEPOSIT,
            debit_account=accounts.CASH,
            credit_account=tenant_account(tenant_id),
            amount_pico=amount_pico,
            currency=CURRENCY,
            reason=body.reason,
            made_by=caller.api_key_id,
        )
    )
    return _tenant(tenant_id, await services.ledger.balance(tenant_id))


@router.post("/keys")
async def create_key(body: NewKey, services: With, caller: Caller) -> dict[str, str]:
    """Make an API key for a tenant or provider. The secret is in this answer and nowhere else."""
    require_operator(caller)
    if (body.tenant_id is None) == (body.provider_id is None):
        raise InvalidRequest("tenant_id or provider_id: say for whom the key is, one of them")
    role = Role.TENANT if body.provider_id is None else Role.PROVIDER
    subject_id = body.tenant_id or body.provider_id or ""
    secret = new_key()
    principal = Principal(key_id(secret), role, subject_id)
    await services.ledger.add_key(principal, hash_key(secret))
    return {"api_key_id": principal.api_key_id, f"{role}_id": subject_id, "api_key": secret}


@router.get("/keys")
async def list_keys(services: With, caller: Caller) -> list[dict[str, str | None]]:
    """Keys without their secrets."""
    subject = None if caller.role is Role.OPERATOR else caller.subject_id
    return await services.ledger.keys(subject)


@router.delete("/keys/{api_key_id}")
async def revoke_key(api_key_id: str, services: With, caller: Caller) -> dict[str, str]:
    """End a key; gateways refuse it within two seconds."""
    require_operator(caller)
    await services.ledger.revoke_key(api_key_id)
    return {"api_key_id": api_key_id, "state": "revoked"}


def _tenant(tenant_id: str, account: Account) -> dict[str, str]:
    return {
        "tenant_id": tenant_id,
        "balance": pricing.format_money(account.balance_pico),
        "held": pricing.format_money(account.held_pico),
        "available": pricing.format_money(account.available_pico),
        "currency": account.currency,
    }


def _prices(card: Any) -> dict[str, str | None]:
    if card is None:
        return {"input_price": None, "cached_input_price": None, "output_price": None}
    return {
        "input_price": pricing.format_price(card.input_pico),
        "cached_input_price": pricing.format_price(card.cached_input_pico),
        "output_price": pricing.format_price(card.output_pico),
    }
