"""Builds statements: what a tenant or provider had, used, paid or earned in a month."""

from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb

from market.accounts import provider_account, tenant_account
from market.ledger.settling import read_lines
from market.ledger.snapshot import Snapshot
from market.ledger.statement import DayTotal, Movement, Party, Statement, UsageLine
from market.pricing import to_decimal

ZERO = Decimal("0.000000000000")
COLUMN = {Party.TENANT: "tenant_id", Party.PROVIDER: "provider_id"}
_SUMS = (
    "count(*) FILTER (kind = 'tokens') AS requests, "
    "CAST(coalesce(sum(input_tokens), 0) AS BIGINT) AS input_tokens, "
    "CAST(coalesce(sum(cached_input_tokens), 0) AS BIGINT) AS cached_input_tokens, "
    "CAST(coalesce(sum(output_tokens), 0) AS BIGINT) AS output_tokens, "
    "CAST(coalesce(sum(gpu_us), 0) AS BIGINT) AS gpu_us, sum(charge) AS charge"
)


def statement_id(party: Party, name: str, period: str) -> str:
    """Id of a statement: the same month's is always the same."""
    return f"{period}-{party}-{name}"


def build(
    snapshot: Snapshot,
    who: tuple[Party, str],
    month: tuple[str, datetime, datetime],
    sealed: dict[str, Any],
) -> Statement:
    """The statement of a party for a month, by booking time.

    ``sealed`` has what only the ledger knows: issuer, currency, checkpoint, settlement_id (None
    if the month is open) and settlement_file.
    """
    party, name = who
    period, start, end = month
    account = (tenant_account if party is Party.TENANT else provider_account)(name)
    with snapshot.connect() as connection:
        opening, movements = _movements(connection, account, start, end)
        where = f"{COLUMN[party]} = $name AND booked_at >= $start AND booked_at < $end"
        parameters = {"name": name, "start": start, "end": end}
        lines = _lines(connection, where, parameters, _fees(who, sealed))
        days = _days(connection, where, parameters)
        rows, lsn_lo, lsn_hi = _one(
            connection, f"SELECT count(*), min(lsn), max(lsn) FROM usage WHERE {where}", parameters
        )
    return Statement(
        statement_id=statement_id(party, name, period),
        party=party,
        name=name,
        issuer=sealed["issuer"],
        period=period,
        start=start,
        end=end,
        currency=sealed["currency"],
        opening=opening,
        closing=opening + sum((movement.amount for movement in movements), ZERO),
        movements=movements,
        lines=lines,
        days=days,
        lsn_lo=lsn_lo,
        lsn_hi=lsn_hi,
        rows=rows,
        settlement_id=sealed["settlement_id"],
        checkpoint=sealed["checkpoint"],
    )


def _movements(
    connection: duckdb.DuckDBPyConnection, account: str, start: datetime, end: datetime
) -> tuple[Decimal, tuple[Movement, ...]]:
    """Balance at the start, and per kind what changed it until the end."""
    # Releases have the account on both sides: they move nothing.
    signed = (
        "SELECT booked_at, kind, CASE WHEN credit_account = $account THEN amount ELSE -amount END "
        "AS amount FROM transfers WHERE (credit_account = $account OR debit_account = $account) "
        "AND credit_account <> debit_account"
    )
    opening = _one(
        connection,
        f"SELECT coalesce(sum(amount), 0) FROM ({signed}) WHERE booked_at < $start",
        {"account": account, "start": start},
    )[0]
    rows = connection.execute(
        f"SELECT kind, count(*), sum(amount) FROM ({signed}) "
        "WHERE booked_at >= $start AND booked_at < $end GROUP BY kind ORDER BY kind",
        {"account": account, "start": start, "end": end},
    ).fetchall()
    return ZERO + opening, tuple(Movement(*row) for row in rows)


def _lines(
    connection: duckdb.DuckDBPyConnection,
    where: str,
    parameters: dict[str, Any],
    fees: dict[tuple[str, str], Decimal] | None,
) -> tuple[UsageLine, ...]:
    cursor = connection.execute(
        f"SELECT coalesce(model, '-') AS model, lane, {_SUMS} FROM usage WHERE {where} "
        "GROUP BY ALL ORDER BY ALL",
        parameters,
    )
    names = [column[0] for column in cursor.description or []]
    lines = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    for line in lines:
        line["fee"] = None if fees is None else fees.get((line["model"], line["lane"]), ZERO)
    return tuple(UsageLine(**line) for line in lines)


def _fees(who: tuple[Party, str], sealed: dict[str, Any]) -> dict[tuple[str, str], Decimal] | None:
    """A provider's fees per model and lane, once its month is settled."""
    party, name = who
    path: Path | None = sealed["settlement_file"]
    if party is not Party.PROVIDER or path is None:
        return None
    picos: dict[tuple[str, str], int] = {}
    for line in read_lines(path).lines:
        if line.provider_id == name:
            key = (line.model or "-", line.lane)
            picos[key] = picos.get(key, 0) + line.fee_pico
    return {key: to_decimal(pico) for key, pico in picos.items()}


def _days(
    connection: duckdb.DuckDBPyConnection, where: str, parameters: dict[str, Any]
) -> tuple[DayTotal, ...]:
    rows = connection.execute(
        "SELECT CAST(booked_at AT TIME ZONE 'UTC' AS DATE) AS day, "
        "count(*) FILTER (kind = 'tokens'), CAST(sum(input_tokens) AS BIGINT), "
        f"CAST(sum(output_tokens) AS BIGINT), sum(charge) FROM usage WHERE {where} "
        "GROUP BY day ORDER BY day",
        parameters,
    ).fetchall()
    return tuple(DayTotal(*row) for row in rows)


def _one(
    connection: duckdb.DuckDBPyConnection, query: str, parameters: dict[str, Any]
) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row
