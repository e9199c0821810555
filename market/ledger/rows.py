"""Rows of the books as values and back: accounts, holds, transfers."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime

from sqlalchemy import Connection, Row, Table, select

from market.accounts import Account, Books, Hold, HoldState, Side, Transfer, TransferKind
from market.ledger import tables
from market.types import HoldRequest, Lane


def load_books(
    connection: Connection,
    account_ids: Iterable[str] = (),
    hold_ids: Iterable[str] = (),
    transfer_ids: Iterable[str] = (),
) -> Books:
    """The accounts, holds and transfers with these ids, those that exist."""
    account_rows = _rows_by_key(connection, tables.accounts, "account_id", account_ids)
    hold_rows = _rows_by_key(connection, tables.holds, "hold_id", hold_ids)
    transfer_rows = _rows_by_key(connection, tables.transfers, "transfer_id", transfer_ids)
    return Books(
        map(account_from, account_rows), map(hold_from, hold_rows), map(_transfer, transfer_rows)
    )


def _rows_by_key(
    connection: Connection, table: Table, key: str, values: Iterable[str]
) -> Sequence[Row[tuple[object, ...]]]:
    wanted = sorted(set(values))
    if not wanted:
        return []
    return connection.execute(select(table).where(table.c[key].in_(wanted))).all()


def account_from(row: Row[tuple[object, ...]]) -> Account:
    """An account of its row."""
    values = dict(row._mapping)
    return Account(**{**values, "side": Side(values["side"])})


def hold_row(hold: Hold) -> dict[str, object]:
    """The row of a hold; what a record needs if its gateway dies goes in as JSON."""
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
    }


def hold_from(row: Row[tuple[object, ...]]) -> Hold:
    """A hold of its row."""
    values = row._mapping
    request = json.loads(values["request"])
    request["lane"] = Lane(request["lane"])
    request["started_at"] = datetime.fromisoformat(request["started_at"])
    return Hold(
        HoldRequest(**request),
        values["amount_pico"],
        HoldState(values["state"]),
        values["posted_pico"],
    )


def _transfer(row: Row[tuple[object, ...]]) -> Transfer:
    values = dict(row._mapping)
    del values["tsn"], values["booked_at"]
    return Transfer(**{**values, "kind": TransferKind(values["kind"])})
