"""``/market/v1``: prices, tenants' money. Operators see all, tenants themselves."""

import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from market import accounts, pricing, when
from market.accounts import Account, Transfer, TransferKind, tenant_account
from market.errors import InvalidRequest
from market.types import CURRENCY, Lane, Pack, PackLeft, Period
from serve_apps.auth import require_lane, require_model, require_operator, require_tenant
from serve_apps.http import Caller, Count, Name, Strict, With, Words

router = APIRouter(prefix="/market/v1")


class NewTenant(Strict):
    """Body of ``POST /tenants``."""

    tenant_id: Name


class NewDeposit(Strict):
    """Body of ``POST /tenants/{id}/deposits``; ``deposit_id`` makes it safe to repeat."""

    amount: Name
    deposit_id: Name
    reason: Words = "deposit"


class TenantChange(Strict):
    """Body of ``PATCH /tenants/{id}``: what is left out stays.

    ``budgets`` by period (hour, day, month, total) in the market's currency, null for none.
    """

    weight: Annotated[Count, Field(ge=1)] | None = None
    budgets: dict[Period, Name | None] | None = None


class NewPack(Strict):
    """Body of ``POST /tenants/{id}/packs``: tokens of a model, bought ahead.

    ``discount_percent`` off today's prices, which the pack keeps until it expires.
    """

    model: Name
    tokens: Annotated[int, Field(ge=1, le=10**15)]
    valid_for: Name = "30d"
    discount_percent: Annotated[int, Field(ge=0, le=100)] = 0
    pack_id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")] = Field(
        default_factory=lambda: f"pack-{uuid.uuid4().hex[:12]}"
    )


class NewProvider(Strict):
    """Body of ``POST /providers``."""

    provider_id: Name


class NewPrice(Strict):
    """Body of ``POST /prices``, per million tokens; in force from ``valid_from`` on (now)."""

    model: Name
    input_price: Name
    output_price: Name
    cached_input_price: Name | None = None
    valid_from: Name | None = None


@router.get("/prices")
async def prices(services: With, _caller: Caller) -> list[dict[str, Any]]:
    """Rate cards in force, per million tokens."""
    return [
        {"model": card.model, "price_id": card.price_id, **price_row(card)}
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
    await services.scheduler.model(body.model)
    now = services.clock.now()
    prices = (
        pricing.parse_price(body.input_price, "input_price"),
        pricing.parse_price(body.cached_input_price or body.input_price, "cached_input_price"),
        pricing.parse_price(body.output_price, "output_price"),
    )
    start = now if body.valid_from is None else when.moment(body.valid_from, now, "valid_from")
    if start < now:
        raise InvalidRequest("valid_from: prices cannot change the past")
    card = pricing.make_rate_card(body.model, prices, start, CURRENCY)
    await services.ledger.add_rate_cards([card], only_new_models=False)
    return {
        "model": card.model,
        "price_id": card.price_id,
        **price_row(card),
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
async def show_tenant(tenant_id: Name, services: With, caller: Caller) -> dict[str, Any]:
    """One tenant's balance."""
    require_tenant(caller, tenant_id)
    account = await services.ledger.balance(tenant_id)
    return {
        **_tenant(tenant_id, account),
        "weight": (await services.ledger.weights()).get(tenant_id, 1),
        "budgets": await services.ledger.budget_rows(account.account_id),
        "packs": [_pack(left) for left in await services.ledger.packs(tenant_id)],
    }


@router.patch("/tenants/{tenant_id}")
async def change_tenant(
    tenant_id: Name, body: TenantChange, services: With, caller: Caller
) -> dict[str, Any]:
    """Set a tenant's share of contended pools, or what it may spend per period."""
    require_operator(caller)
    account = await services.ledger.balance(tenant_id)
    if body.weight is not None:
        await services.ledger.set_weight(tenant_id, body.weight)
    if body.budgets is not None:
        await services.ledger.set_budgets(account.account_id, parse_budgets(body.budgets))
    return await show_tenant(tenant_id, services, caller)


@router.post("/tenants/{tenant_id}/packs")
async def buy_tokens(
    tenant_id: Name, body: NewPack, services: With, caller: Caller
) -> dict[str, Any]:
    """Sell tokens ahead, from the tenant's balance; the same ``pack_id`` sells once."""
    require_tenant(caller, tenant_id)
    require_model(caller, body.model)
    require_lane(caller, Lane.TOKENS)
    if body.discount_percent:
        require_operator(caller)
    await services.scheduler.model(body.model)
    card = await services.ledger.rate_card(body.model)
    if card is None:
        raise InvalidRequest(f"model {body.model} has no price", param="model")
    now = services.clock.now()
    percent = 100 - body.discount_percent
    prices = (
        card.input_pico * percent // 100,
        card.cached_input_pico * percent // 100,
        card.output_pico * percent // 100,
    )
    if prices[2] == 0:
        raise InvalidRequest(f"{body.model} costs nothing per output token; there is no pack of it")
    own = pricing.make_rate_card(f"pack:{body.pack_id}", prices, now, card.currency)
    wanted = Pack(
        pack_id=body.pack_id,
        tenant_id=tenant_id,
        model=body.model,
        price_id=own.price_id,
        tokens=body.tokens,
        currency=card.currency,
        bought_at=now,
        expires_at=now + timedelta(seconds=when.duration(body.valid_for, "valid_for")),
    )
    pack, created = await services.ledger.buy_tokens(wanted, own, caller.api_key_id)
    left = [one for one in await services.ledger.packs(tenant_id) if one.pack == pack]
    return {"created": created, "tenant_id": tenant_id, **(_pack(left[0]) if left else {})}


@router.post("/tenants/{tenant_id}/deposits")
async def deposit(
    tenant_id: Name, body: NewDeposit, services: With, caller: Caller
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


def parse_budgets(budgets: Mapping[Period, str | None]) -> dict[Period, int | None]:
    """Amounts as pico units. Raises InvalidRequest for a negative one."""
    limits: dict[Period, int | None] = {}
    for period, amount in budgets.items():
        limits[period] = None if amount is None else pricing.parse_money(amount, f"budget {period}")
        if (limits[period] or 0) < 0:
            raise InvalidRequest(f"budget per {period}: it cannot be negative")
    return limits


def _pack(left: PackLeft) -> dict[str, Any]:
    return {
        "pack_id": left.pack.pack_id,
        "model": left.pack.model,
        "tokens": left.pack.tokens,
        "tokens_left": left.available_pico // left.card.output_pico,
        "price_id": left.card.price_id,
        **price_row(left.card),
        "expires_at": left.pack.expires_at.isoformat(),
    }


def _tenant(tenant_id: str, account: Account) -> dict[str, str]:
    return {
        "tenant_id": tenant_id,
        "balance": pricing.format_money(account.balance_pico),
        "held": pricing.format_money(account.held_pico),
        "available": pricing.format_money(account.available_pico),
        "currency": account.currency,
    }


def price_row(card: Any) -> dict[str, str | None]:
    """A rate card's prices as JSON, per million tokens; null for none."""
    if card is None:
        return {"input_price": None, "cached_input_price": None, "output_price": None}
    return {
        "input_price": pricing.format_price(card.input_pico),
        "cached_input_price": pricing.format_price(card.cached_input_pico),
        "output_price": pricing.format_price(card.output_pico),
    }
