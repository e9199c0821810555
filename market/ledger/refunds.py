"""Refunds: corrections are new rows, never edits. A request is taken back whole or in part."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, select

from market import pricing
from market.accounts import MARKET_PROVIDER, provider_account, tenant_account
from market.errors import Conflict, InvalidRequest
from market.ledger import tables
from market.ledger.store import LedgerStore
from market.metering import NOT_TAKEN
from market.types import CURRENCY, Lane, RecordKind, UsageQuality, UsageRecord


@dataclass(frozen=True, slots=True)
class Refund:
    """What to give back, by whom and why.

    Of a request: all of it, or ``amount_pico``. Without one: ``amount_pico`` at the cost of
    ``provider_id``, by default the market itself.
    """

    refund_id: str
    tenant_id: str
    reason: str
    made_by: str
    request_id: str | None = None
    amount_pico: int | None = None
    provider_id: str | None = None

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise InvalidRequest("reason: say why; it goes into the ledger")
        if self.request_id is None and self.amount_pico is None:
            raise InvalidRequest("refund what? give a request or an amount")
        if self.request_id is not None and self.provider_id is not None:
            raise InvalidRequest(
                "provider: the provider of a request's refund is the request's own"
            )
        if self.amount_pico is not None and self.amount_pico <= 0:
            raise InvalidRequest("amount: a refund must be positive")


def book(
    connection: Connection,
    store: LedgerStore,
    refund: Refund,
    original: dict[str, Any] | None,
    now: datetime,
) -> dict[str, Any]:
    """Book a refund once per id; ``original`` is the request's own row.

    Raises Conflict if the id was used for another refund or the request was given back before,
    InvalidRequest if there is less to give back.
    """
    known = connection.execute(
        select(tables.refunds).where(tables.refunds.c.refund_id == refund.refund_id)
    ).one_or_none()
    if original is None:
        amount_pico = refund.amount_pico
        assert amount_pico is not None
        provider_id = refund.provider_id or MARKET_PROVIDER
        record = _gift(refund, provider_id, amount_pico, now)
    else:
        amount_pico, record = _correction(connection, refund, original, known)
        provider_id = original["provider_id"]
    lsn = original and original["lsn"]
    if known is not None:
        before = (known.tenant_id, known.provider_id, known.reverses_lsn, known.amount_pico)
        if before != (refund.tenant_id, provider_id, lsn, amount_pico):
            raise Conflict(f"refund id {refund.refund_id} was used for another refund")
        return _answer(known.lsn, known.amount_pico, created=False)
    for account_id in (tenant_account(refund.tenant_id), provider_account(provider_id)):
        if store.account(connection, account_id) is None:
            raise InvalidRequest(f"there is no {account_id.replace(':', ' ')}")
    booked, _ = store.book_own(connection, [record])
    connection.execute(
        tables.refunds.insert().values(
            refund_id=refund.refund_id,
            tenant_id=refund.tenant_id,
            provider_id=provider_id,
            reverses_lsn=lsn,
            lsn=booked,
            amount_pico=amount_pico,
        )
    )
    return _answer(booked, amount_pico, created=True)


def _answer(lsn: int, amount_pico: int, created: bool) -> dict[str, Any]:
    return {"lsn": lsn, "refunded": pricing.format_money(amount_pico), "created": created}


def _correction(
    connection: Connection,
    refund: Refund,
    original: dict[str, Any],
    known: Row[Any] | None,
) -> tuple[int, UsageRecord]:
    """(amount, row) that takes back a request: a reversal if all of it, else an adjustment."""
    if original["tenant_id"] != refund.tenant_id:
        raise InvalidRequest(f"request {refund.request_id} is not one of {refund.tenant_id}")
    charge_pico = pricing.to_pico(original["charge"])
    if known is not None:
        before = 0  # what it gave back itself is not in its own way
    else:
        query = select(tables.refunds.c.amount_pico).where(
            tables.refunds.c.reverses_lsn == original["lsn"]
        )
        before = sum(connection.execute(query).scalars())
    amount_pico = charge_pico if refund.amount_pico is None else refund.amount_pico
    if amount_pico <= 0:
        raise InvalidRequest(f"request {refund.request_id} was not charged")
    if before + amount_pico > charge_pico:
        raise Conflict(
            f"request {refund.request_id} cost {pricing.format_money(charge_pico)}, of which "
            f"{pricing.format_money(before)} was given back: cannot give back "
            f"{pricing.format_money(amount_pico)} more",
            code="already_refunded",
        )
    whole = amount_pico == charge_pico
    sign = -1 if whole else 0
    names = ("request_id", "tenant_id", "api_key_id", "model", "adapter", "deployment_id")
    places = ("lease_id", "slice_id", "provider_id", "node_id", "gpu_type", "gpu_milli")
    ending = ("started_at", "finished_at", "price_id", "currency")
    return amount_pico, UsageRecord(
        kind=RecordKind.REVERSAL if whole else RecordKind.ADJUSTMENT,
        reverses_lsn=original["lsn"],
        lane=Lane(original["lane"]),
        input_tokens=sign * original["input_tokens"],
        cached_input_tokens=sign * original["cached_input_tokens"],
        output_tokens=sign * original["output_tokens"],
        charge_pico=-amount_pico,
        finish_reason=None,
        usage_quality=UsageQuality(original["usage_quality"]),
        attrs=(*_why(refund), *(_not_taken(original) if whole else ())),
        **{name: original[name] for name in (*names, *places, *ending)},
    )


def _gift(refund: Refund, provider_id: str, amount_pico: int, now: datetime) -> UsageRecord:
    return UsageRecord(
        kind=RecordKind.ADJUSTMENT,
        request_id=None,
        tenant_id=refund.tenant_id,
        api_key_id=None,
        model=None,
        lane=Lane.TOKENS,
        deployment_id=None,
        provider_id=provider_id,
        node_id=None,
        gpu_type=None,
        gpu_milli=None,
        started_at=now,
        finished_at=now,
        input_tokens=0,
        cached_input_tokens=0,
        output_tokens=0,
        price_id=pricing.NO_PRICE.price_id,
        charge_pico=-amount_pico,
        currency=CURRENCY,
        finish_reason=None,
        attrs=_why(refund),
    )


def _not_taken(original: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """With the charge goes what its way saved: a reversal has the price not taken, too."""
    return tuple(pair for pair in original["attrs"] or () if pair[0].startswith(NOT_TAKEN))


def _why(refund: Refund) -> tuple[tuple[str, str], ...]:
    return (
        ("made_by", refund.made_by),
        ("reason", refund.reason),
        ("refund_id", refund.refund_id),
    )
