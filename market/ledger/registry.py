"""Who takes part and at what price: tenants, providers, API keys (hashes only), rate cards."""

import re
from datetime import datetime

from sqlalchemy import Connection, Row, func, select, update

from market.errors import InvalidRequest, NotFound
from market.ledger import tables
from market.types import Principal, RateCard, Role

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


def add_key(
    connection: Connection, principal: Principal, key_hash: str, now: datetime
) -> Principal:
    """Store a key's hash. The same hash again returns the key it already is."""
    known = find_key(connection, key_hash)
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
        )
    )
    return principal


def find_key(connection: Connection, key_hash: str) -> Principal | None:
    """Whom a key speaks for; None if unknown or revoked."""
    keys = tables.api_keys
    query = select(keys).where(keys.c.key_hash == key_hash, keys.c.revoked_at.is_(None))
    row = connection.execute(query).one_or_none()
    return None if row is None else Principal(row.api_key_id, Role(row.role), row.subject_id)


def list_keys(connection: Connection, subject_id: str | None) -> list[dict[str, str | None]]:
    """Keys without their hashes, of one subject or of all."""
    query = select(tables.api_keys).order_by(tables.api_keys.c.created_at)
    if subject_id is not None:
        query = query.where(tables.api_keys.c.subject_id == subject_id)
    return [
        {
            "api_key_id": row.api_key_id,
            "role": row.role,
            "subject_id": row.subject_id,
            "created_at": row.created_at.isoformat(),
            "revoked_at": None if row.revoked_at is None else row.revoked_at.isoformat(),
        }
        for row in connection.execute(query)
    ]


def revoke_key(connection: Connection, api_key_id: str, now: datetime) -> None:
    """End a key. Raises NotFound; revoking twice keeps the first time."""
    keys = tables.api_keys
    row = connection.execute(select(keys).where(keys.c.api_key_id == api_key_id)).one_or_none()
    if row is None:
        raise NotFound(f"no API key {api_key_id!r}; see: market keys ls", code="key_not_found")
    if row.revoked_at is None:
        statement = update(keys).where(keys.c.api_key_id == api_key_id)
        connection.execute(statement.values(revoked_at=now))


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
