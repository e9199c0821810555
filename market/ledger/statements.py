"""Builds statements: what tenants or providers had, used, paid or earned in a month."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb

from market.accounts import provider_account, tenant_account
from market.ledger.settling import read_lines
from market.ledger.snapshot import Snapshot
from market.ledger.statement import DayTotal, Movement, Party, Statement, UsageLine
from market.pricing import to_decimal, to_pico

ZERO = Decimal("0.000000000000")
COLUMN = {Party.TENANT: "tenant_id", Party.PROVIDER: "provider_id"}
ACCOUNT = {Party.TENANT: tenant_account, Party.PROVIDER: provider_account}
_SUMS = (
    "count(*) FILTER (kind = 'tokens') AS requests, "
    "CAST(coalesce(sum(input_tokens), 0) AS BIGINT) AS input_tokens, "
    "CAST(coalesce(sum(cached_input_tokens), 0) AS BIGINT) AS cached_input_tokens, "
    "CAST(coalesce(sum(output_tokens), 0) AS BIGINT) AS output_tokens, "
    "CAST(coalesce(sum(gpu_us), 0) AS BIGINT) AS gpu_us, sum(charge) AS charge, "
    "CAST(coalesce(sum(CAST(attrs['credited_us'] AS BIGINT) * gpu_milli // 1000) "
    "FILTER (kind = 'gpu'), 0) AS BIGINT) AS credited_us"
)


@dataclass(frozen=True, slots=True)
class Month:
    """A month, and what only the ledger knows of it; settlement_* are None while it is open."""

    period: str
    start: datetime
    end: datetime
    issuer: str
    currency: str
    checkpoint: str
    settlement_id: str | None
    settlement_file: Path | None


def statement_id(party: Party, name: str, period: str) -> str:
    """Id of a statement: the same month's is always the same."""
    return f"{period}-{party}-{name}"


def build(
    snapshot: Snapshot, party: Party, names: Sequence[str], month: Month
) -> dict[str, Statement]:
    """The statements of these parties for a month, by booking time, in one pass over the rows."""
    column, account = COLUMN[party], ACCOUNT[party]
    parameters = {"names": list(names), "start": month.start, "end": month.end}
    with snapshot.connect() as connection:
        accounts = {"names": [account(name) for name in names]}
        balances = _movements(connection, parameters | accounts)
        connection.execute(
            f"CREATE TEMP TABLE totals AS SELECT {column} AS name, "
            "CAST(booked_at AT TIME ZONE 'UTC' AS DATE) AS day, coalesce(model, '-') AS model, "
            f"lane, {_SUMS}, count(*) AS rows, min(lsn) AS lsn_lo, max(lsn) AS lsn_hi FROM usage "
            f"WHERE booked_at >= $start AND booked_at < $end AND list_contains($names, {column}) "
            "GROUP BY ALL",
            parameters,
        )
        lines = _lines(connection)
        days = _days(connection)
        covered = {
            name: rest
            for name, *rest in connection.execute(
                "SELECT name, CAST(sum(rows) AS BIGINT), min(lsn_lo), max(lsn_hi) FROM totals "
                "GROUP BY name"
            ).fetchall()
        }
    parts = _settled_parts(party, month)
    statements = {}
    for name in names:
        opening, movements = balances[account(name)]
        rows, lsn_lo, lsn_hi = covered.get(name, (0, None, None))
        statements[name] = Statement(
            statement_id=statement_id(party, name, month.period),
            party=party,
            name=name,
            issuer=month.issuer,
            period=month.period,
            start=month.start,
            end=month.end,
            currency=month.currency,
            opening=opening,
            closing=to_decimal(sum(map(to_pico, (opening, *(m.amount for m in movements))))),
            movements=movements,
            lines=tuple(
                UsageLine(
                    **line,
                    fee=_part(parts, name, line, "fee"),
                    share=_part(parts, name, line, "share"),
                )
                for line in lines.get(name, ())
            ),
            days=tuple(days.get(name, ())),
            lsn_lo=lsn_lo,
            lsn_hi=lsn_hi,
            rows=rows,
            settlement_id=month.settlement_id,
            checkpoint=month.checkpoint,
        )
    return statements


def _movements(
    connection: duckdb.DuckDBPyConnection, parameters: dict[str, Any]
) -> dict[str, tuple[Decimal, tuple[Movement, ...]]]:
    """Per account its balance at the start, and per kind what changed it until the end.

    A tenant's token packs are its money, too: buying one moves nothing.
    """
    holder = (
        "CASE WHEN starts_with({0}, 'pack:') THEN 'tenant:' || split_part({0}, ':', 2) ELSE {0} END"
    )
    credit, debit = holder.format("credit_account"), holder.format("debit_account")
    # Releases have the account on both sides: they move nothing, either.
    signed = (
        f"SELECT booked_at, kind, {credit} AS account, amount FROM transfers "
        f"WHERE {credit} <> {debit} UNION ALL "
        f"SELECT booked_at, kind, {debit}, -amount FROM transfers WHERE {credit} <> {debit}"
    )
    rows = connection.execute(
        "SELECT account, booked_at < $start AS before, CASE WHEN before THEN '' ELSE kind END AS "
        f"kind, count(*), sum(amount) FROM ({signed}) "
        "WHERE booked_at < $end AND list_contains($names, account) GROUP BY ALL ORDER BY ALL",
        parameters,
    ).fetchall()
    opening: dict[str, Decimal] = defaultdict(lambda: ZERO)
    movements: dict[str, list[Movement]] = defaultdict(list)
    for account, before, kind, count, amount in rows:
        if before:
            opening[account] = amount  # there is one such row per account
        else:
            movements[account].append(Movement(kind, count, amount))
    return {
        account: (opening[account], tuple(movements[account])) for account in parameters["names"]
    }


def _lines(connection: duckdb.DuckDBPyConnection) -> dict[str, list[dict[str, Any]]]:
    """Per party the sums per model and lane."""
    names = ("requests", "input_tokens", "cached_input_tokens", "output_tokens", "gpu_us",
             "credited_us")  # fmt: skip
    sums = ", ".join(f"CAST(sum({name}) AS BIGINT) AS {name}" for name in names)
    cursor = connection.execute(
        f"SELECT name, model, lane, {sums}, sum(charge) AS charge FROM totals "
        "GROUP BY name, model, lane ORDER BY ALL"
    )
    columns = [column[0] for column in cursor.description or []]
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in cursor.fetchall():
        line = dict(zip(columns, row, strict=True))
        lines[line.pop("name")].append(line)
    return lines


def _days(connection: duckdb.DuckDBPyConnection) -> dict[str, list[DayTotal]]:
    """Per party the sums per day."""
    rows = connection.execute(
        "SELECT name, day, CAST(sum(requests) AS BIGINT), CAST(sum(input_tokens) AS BIGINT), "
        "CAST(sum(output_tokens) AS BIGINT), sum(charge) FROM totals "
        "GROUP BY name, day ORDER BY ALL"
    ).fetchall()
    days: dict[str, list[DayTotal]] = defaultdict(list)
    for name, *values in rows:
        days[name].append(DayTotal(*values))
    return days


PARTS = ("fee", "share")


def _settled_parts(
    party: Party, month: Month
) -> dict[tuple[str, str, str], dict[str, Decimal]] | None:
    """Fee and share per provider, model and lane, once the month is settled."""
    if party is not Party.PROVIDER or month.settlement_file is None:
        return None
    picos: dict[tuple[str, str, str], dict[str, int]] = defaultdict(lambda: dict.fromkeys(PARTS, 0))
    for line in read_lines(month.settlement_file).lines:
        sums = picos[line.provider_id, line.model or "-", line.lane]
        sums["fee"] += line.fee_pico
        sums["share"] += line.share_pico
    return {
        key: {part: to_decimal(pico) for part, pico in sums.items()} for key, sums in picos.items()
    }


def _part(
    parts: dict[tuple[str, str, str], dict[str, Decimal]] | None,
    name: str,
    line: dict[str, Any],
    part: str,
) -> Decimal | None:
    if parts is None:
        return None
    return parts.get((name, line["model"], line["lane"]), {}).get(part, ZERO)
