"""Rows of the books as values and back: accounts and holds."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime

from sqlalchemy import Connection, Row, Table, select

from market.accounts import Account, Hold, HoldState, Side
from market.types import Budget, HoldRequest, Lane, Period


def rows_by_key(
    connection: Connection, table: Table, key: str, values: Iterable[str]
) -> Sequence[Row[tuple[object, ...]]]:
    """The rows whose ``key`` is one of ``values``, those that exist."""
    wanted = sorted(set(values))
    if not wanted:
        return []
    return connection.execute(select(table).where(table.c[key].in_(wanted))).all()


def account_from(row: Row[tuple[object, ...]]) -> Account:
    """An account of its row."""
    values = dict(row._mapping)
    return Account(**{**values, "side": Side(values["side"])})


def account_row(account: Account) -> dict[str, object]:
    """The row of an account."""
    return {
        "account_id": account.account_id,
        "side": account.side,
        "may_overdraw": account.may_overdraw,
        "currency": account.currency,
        "debits_pico": account.debits_pico,
        "credits_pico": account.credits_pico,
        "held_pico": account.held_pico,
    }


def hold_row(hold: Hold) -> dict[str, object]:
    """The row of a hold; the request goes in as JSON."""
    request = asdict(hold.request)
    request["started_at"] = hold.request.started_at.isoformat()
    return {
        "hold_id": hold.request.hold_id,
        "producer": hold.request.producer,
        "epoch": hold.request.epoch,
        "request": json.dumps(request),
        "amount_pico": hold.amount_pico,
        "state": hold.state,
        "posted_pico": hold.posted_pico,
        "version": hold.version,
    }


def hold_from(row: Row[tuple[object, ...]]) -> Hold:
    """A hold of its row."""
    values = row._mapping
    request = json.loads(values["request"])
    request["lane"] = Lane(request["lane"])
    request["started_at"] = datetime.fromisoformat(request["started_at"])
    if request.get("cap") is not None:
        cap = request["cap"]
        request["cap"] = Budget(cap["subject"], Period(cap["period"]), cap["limit_pico"])
    return Hold(
        HoldRequest(**request),
        values["amount_pico"],
        HoldState(values["state"]),
        values["posted_pico"],
        values["version"],
    )
