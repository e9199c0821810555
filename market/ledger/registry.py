"""Who takes part and at what price: tenants, providers, API keys (hashes only), budgets, packs,
rate cards.
"""

import hmac
import re
from dataclasses import asdict
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, delete, func, or_, select, update

from market.budgets import Spend
from market.errors import Conflict, InvalidRequest, NotFound
from market.ledger import tables
from market.storage import upsert
from market.types import Budget, KeyPolicy, Pack, Period, Principal, RateCard, Role

WEIGHT_MAX = 1000
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def check_name(what: str, name: str) -> None:
    """Raises InvalidRequest unless ``name`` is fit for an id (it becomes part of others)."""
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"{what} {name!r}: use 1 to 63 of a-z, 0-9, '.', '_' and '-', "
            "starting with a letter or digit"
        )


def create_tenant(connection: Connection, tenant_id: str, now: datetime) -> bool:
    """Add a tenant; False if it is there already."""
    check_name("tenant", tenant_id)
    if tenant_exists(connection, tenant_id):
        return False
    connection.execute(tables.tenants.insert().values(tenant_id=tenant_id, created_at=now))
    return True


def tenant_exists(connection: Connection, tenant_id: str) -> bool:
    """Whether there is such a tenant."""
    query = select(tables.tenants).where(tables.tenants.c.tenant_id == tenant_id)
    return connection.execute(query).first() is not None


def list_tenants(connection: Connection) -> list[str]:
    """Ids of all tenants."""
    query = select(tables.tenants.c.tenant_id).order_by(tables.tenants.c.tenant_id)
    return list(connection.execute(query).scalars())


def create_provider(connection: Connection, provider_id: str, now: datetime) -> bool:
    """Add a provider; False if it is there already."""
    check_name("provider", provider_id)
    query = select(tables.providers).where(tables.providers.c.provider_id == provider_id)
    if connection.execute(query).first() is not None:
        return False
    connection.execute(tables.providers.insert().values(provider_id=provider_id, created_at=now))
    return True


def list_providers(connection: Connection) -> list[str]:
    """Ids of all providers."""
    query = select(tables.providers.c.provider_id).order_by(tables.providers.c.provider_id)
    return list(connection.execute(query).scalars())


def set_weight(connection: Connection, tenant_id: str, weight: int) -> None:
    """A tenant's share of contended pools. Raises NotFound, InvalidRequest."""
    if not 1 <= weight <= WEIGHT_MAX:
        raise InvalidRequest(f"weight: a whole number from 1 to {WEIGHT_MAX}, got {weight}")
    table = tables.tenants
    statement = update(table).where(table.c.tenant_id == tenant_id).values(weight=weight)
    if connection.execute(statement).rowcount == 0:
        raise NotFound(f"tenant {tenant_id!r} does not exist", code="tenant_not_found")


def weights(connection: Connection) -> dict[str, int]:
    """Every tenant's share of contended pools."""
    table = tables.tenants
    return {
        row.tenant_id: row.weight
        for row in connection.execute(select(table.c.tenant_id, table.c.weight))
    }


# -- keys --------------------------------------------------------------------------------------


def add_key(
    connection: Connection, principal: Principal, key_hash: str, now: datetime
) -> Principal:
    """Store a key's hash. The same hash again returns the key it already is."""
    known = find_key(connection, key_hash, now)
    if known is not None:
        return known
    if principal.role is Role.TENANT and not tenant_exists(connection, principal.subject_id):
        raise NotFound(
            f"tenant {principal.subject_id!r} does not exist; create it with: "
            f"market tenants create {principal.subject_id}",
            code="tenant_not_found",
        )
    if principal.role is Role.PROVIDER and principal.subject_id not in list_providers(connection):
        raise NotFound(
            f"provider {principal.subject_id!r} does not exist; create it with: "
            f"market providers create {principal.subject_id}",
            code="provider_not_found",
        )
    connection.execute(
        tables.api_keys.insert().values(
            api_key_id=principal.api_key_id,
            key_hash=key_hash,
            role=principal.role,
            subject_id=principal.subject_id,
            created_at=now,
            policy=_encode(principal.policy),
        )
    )
    return principal


def find_key(connection: Connection, key_hash: str, now: datetime) -> Principal | None:
    """Whom a secret speaks for; None if unknown, revoked or rotated away.

    Found by the index, compared again in constant time.
    """
    keys, tenants = tables.api_keys, tables.tenants
    query = (
        select(keys, tenants.c.weight)
        .join_from(keys, tenants, keys.c.subject_id == tenants.c.tenant_id, isouter=True)
        .where(
            or_(keys.c.key_hash == key_hash, keys.c.previous_hash == key_hash),
            keys.c.revoked_at.is_(None),
        )
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    current = hmac.compare_digest(row.key_hash, key_hash)
    previous = hmac.compare_digest(row.previous_hash or "", key_hash)
    if not current and not (previous and row.previous_until > now):
        return None
    budgets = select(tables.budgets).where(tables.budgets.c.subject == row.api_key_id)
    return Principal(
        row.api_key_id,
        Role(row.role),
        row.subject_id,
        policy=_decode(row.policy),
        weight=row.weight if row.role == Role.TENANT else 1,
        budgeted=connection.execute(budgets).first() is not None,
        secret_until=None if current else row.previous_until,
    )


def list_keys(connection: Connection, owner: tuple[Role, str] | None) -> list[dict[str, Any]]:
    """Keys without their hashes, of one owner or of all: a provider may be named like a tenant."""
    query = select(tables.api_keys).order_by(tables.api_keys.c.created_at)
    if owner is not None:
        role, subject_id = owner
        query = query.where(
            tables.api_keys.c.subject_id == subject_id, tables.api_keys.c.role == role
        )
    return [
        {
            "api_key_id": row.api_key_id,
            "role": row.role,
            "subject_id": row.subject_id,
            "created_at": row.created_at.isoformat(),
            "revoked_at": None if row.revoked_at is None else row.revoked_at.isoformat(),
            "policy": msgspec.to_builtins(_decode(row.policy)),
        }
        for row in connection.execute(query)
    ]


def _key_row(connection: Connection, api_key_id: str) -> Row[Any]:
    keys = tables.api_keys
    row = connection.execute(select(keys).where(keys.c.api_key_id == api_key_id)).one_or_none()
    if row is None:
        raise NotFound(f"no API key {api_key_id!r}; see: market keys ls", code="key_not_found")
    return row


def key(connection: Connection, api_key_id: str) -> Principal:
    """Whose key it is and what it may do; no weight or budget is looked up. Raises NotFound."""
    row = _key_row(connection, api_key_id)
    return Principal(row.api_key_id, Role(row.role), row.subject_id, _decode(row.policy))


def set_policy(connection: Connection, api_key_id: str, policy: KeyPolicy) -> None:
    """What a key may do from now on. Raises NotFound."""
    _key_row(connection, api_key_id)
    keys = tables.api_keys
    statement = update(keys).where(keys.c.api_key_id == api_key_id)
    connection.execute(statement.values(policy=_encode(policy)))


def rotate_key(
    connection: Connection, api_key_id: str, key_hash: str, previous_until: datetime
) -> None:
    """Give a key a new secret; the one it had works on until ``previous_until``.

    Raises NotFound, or Conflict if the key is revoked. The same hash again changes nothing.
    """
    row = _key_row(connection, api_key_id)
    if row.revoked_at is not None:
        raise Conflict(f"key {api_key_id} is revoked", code="key_revoked")
    if row.key_hash == key_hash:
        return
    keys = tables.api_keys
    connection.execute(
        update(keys)
        .where(keys.c.api_key_id == api_key_id)
        .values(key_hash=key_hash, previous_hash=row.key_hash, previous_until=previous_until)
    )


def revoke_key(connection: Connection, api_key_id: str, now: datetime) -> None:
    """End a key. Raises NotFound; revoking twice keeps the first time."""
    if _key_row(connection, api_key_id).revoked_at is None:
        statement = update(tables.api_keys).where(tables.api_keys.c.api_key_id == api_key_id)
        connection.execute(statement.values(revoked_at=now))


def _encode(policy: KeyPolicy) -> str:
    return msgspec.json.encode(policy).decode()


def _decode(text: str) -> KeyPolicy:
    return msgspec.json.decode(text, type=KeyPolicy)


# -- budgets and packs -------------------------------------------------------------------------


def set_budget(connection: Connection, budget: Budget) -> None:
    """Set or replace a budget."""
    row = {
        "subject": budget.subject,
        "period": budget.period,
        "limit_pico": budget.limit_pico,
    }
    upsert(connection, tables.budgets, [row])


def remove_budget(connection: Connection, subject: str, period: Period) -> None:
    """No limit for this period any more."""
    table = tables.budgets
    own = (table.c.subject == subject, table.c.period == period)
    connection.execute(delete(table).where(*own))


def all_budgets(connection: Connection) -> dict[str, tuple[Budget, ...]]:
    """Budgets by subject."""
    found: dict[str, tuple[Budget, ...]] = {}
    for row in connection.execute(select(tables.budgets)):
        budget = Budget(row.subject, Period(row.period), row.limit_pico)
        found[row.subject] = (*found.get(row.subject, ()), budget)
    return found


def all_spends(connection: Connection) -> dict[tuple[str, Period], Spend]:
    """What was spent of each budget."""
    return {
        (row.subject, Period(row.period)): Spend(row.since, row.spent_pico)
        for row in connection.execute(select(tables.spends))
    }


def add_pack(connection: Connection, pack: Pack) -> None:
    """Store a pack."""
    connection.execute(tables.packs.insert().values(**asdict(pack)))


def find_pack(connection: Connection, pack_id: str) -> Pack | None:
    """A pack, open or closed."""
    query = select(tables.packs).where(tables.packs.c.pack_id == pack_id)
    row = connection.execute(query).one_or_none()
    return None if row is None else _pack(row)


def open_packs(connection: Connection) -> dict[str, Pack]:
    """Packs that are not closed, by id."""
    query = select(tables.packs).where(tables.packs.c.closed_at.is_(None))
    return {row.pack_id: _pack(row) for row in connection.execute(query)}


def close_pack(connection: Connection, pack_id: str, now: datetime) -> None:
    """Nothing is left of a pack."""
    table = tables.packs
    connection.execute(update(table).where(table.c.pack_id == pack_id).values(closed_at=now))


def _pack(row: Row[Any]) -> Pack:
    values = dict(row._mapping)
    del values["closed_at"]
    return Pack(**values)


# -- prices ------------------------------------------------------------------------------------


def add_rate_card(connection: Connection, card: RateCard) -> None:
    """Add a price; the same card again changes nothing."""
    if rate_cards_by_id(connection, {card.price_id}):
        return
    connection.execute(
        tables.rate_cards.insert().values(
            price_id=card.price_id,
            model=card.model,
            input_pico=card.input_pico,
            cached_input_pico=card.cached_input_pico,
            output_pico=card.output_pico,
            currency=card.currency,
            valid_from=card.valid_from,
            gpu_hour_pico=card.gpu_hour_pico,
        )
    )


def rate_cards_by_id(connection: Connection, price_ids: set[str]) -> dict[str, RateCard]:
    """The cards with these ids; unknown ids are left out."""
    query = select(tables.rate_cards).where(tables.rate_cards.c.price_id.in_(sorted(price_ids)))
    return {row.price_id: _rate_card(row) for row in connection.execute(query)}


def all_rate_cards(connection: Connection) -> dict[str, RateCard]:
    """Every card there ever was, by id."""
    return {row.price_id: _rate_card(row) for row in connection.execute(select(tables.rate_cards))}


def rate_card(connection: Connection, model: str, now: datetime) -> RateCard | None:
    """The price of a model in force at ``now``."""
    cards = tables.rate_cards
    query = (
        select(cards)
        .where(cards.c.model == model, cards.c.valid_from <= now)
        .order_by(cards.c.valid_from.desc(), cards.c.price_id)
        .limit(1)
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else _rate_card(row)


def current_rate_cards(connection: Connection, now: datetime) -> list[RateCard]:
    """The price in force of every priced model, by model."""
    cards = tables.rate_cards
    rank = func.row_number().over(
        partition_by=cards.c.model, order_by=(cards.c.valid_from.desc(), cards.c.price_id)
    )
    ranked = select(cards, rank.label("rank")).where(cards.c.valid_from <= now).subquery()
    query = select(ranked).where(ranked.c.rank == 1).order_by(ranked.c.model)
    return [_rate_card(row) for row in connection.execute(query)]


def _rate_card(row: Row[tuple[object, ...]]) -> RateCard:
    values = dict(row._mapping)
    values.pop("rank", None)
    return RateCard(**values)
