"""The journal: what was booked, in order, chained by hashes. Parquet is published from it."""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
from sqlalchemy import Connection

from market.accounts import Transfer, TransferKind
from market.ledger import tables
from market.ledger.schema import TRANSFERS, encode, money_array
from market.ledger.state import Counters
from market.storage import to_micros

# Transfers with an id of the caller's: kept by id, so that asking again books nothing.
_ASKED_KINDS = frozenset({TransferKind.DEPOSIT, TransferKind.FEE, TransferKind.SETTLE})


@dataclass(frozen=True, slots=True)
class Arrived:
    """Usage rows with the identity of the first; ``payload`` is the same as bytes."""

    producer: str
    epoch: int
    first_seq: int
    batch: pa.RecordBatch
    payload: bytes


def enter(
    connection: Connection,
    counters: Counters,
    booked_at: datetime,
    arrived: Arrived | None,
    transfers: Sequence[Transfer],
) -> None:
    """Write one entry: usage rows, the transfers they cause, the chain's new head.

    Advances ``counters``.
    """
    rows = 0 if arrived is None else int(arrived.batch.num_rows)
    values: dict[str, Any] = {
        "entry": counters.next_entry,
        "booked_at": booked_at,
        "lsn_lo": counters.next_lsn,
        "lsn_hi": counters.next_lsn + rows - 1,
        "tsn_lo": counters.next_tsn,
        "tsn_hi": counters.next_tsn + len(transfers) - 1,
        "producer": arrived and arrived.producer,
        "epoch": arrived and arrived.epoch,
        "first_seq": arrived and arrived.first_seq,
        "usage": arrived and arrived.payload,
        "transfers": _encode(transfers, counters.next_tsn, booked_at),
    }
    values["head"] = chain_head(counters.head, values)
    connection.execute(tables.journal.insert(), values)
    asked = [
        {"tsn": counters.next_tsn + offset, **_indexed(transfer)}
        for offset, transfer in enumerate(transfers)
        if transfer.kind in _ASKED_KINDS
    ]
    if asked:
        connection.execute(tables.transfers.insert(), asked)
    counters.next_entry += 1
    counters.next_lsn += rows
    counters.next_tsn += len(transfers)
    counters.head = values["head"]


def chain_head(previous: bytes, entry: Mapping[str, Any]) -> bytes:
    """Head of the hash chain after ``entry`` (a row of the journal, or its values)."""
    digest = hashlib.sha256(previous)
    numbers = (entry["entry"], entry["lsn_lo"], entry["lsn_hi"], entry["tsn_lo"], entry["tsn_hi"])
    digest.update(struct.pack("<6q", *numbers, to_micros(entry["booked_at"])))
    identity = f"{entry['producer']}/{entry['epoch']}/{entry['first_seq']}"
    for part in (identity.encode(), entry["usage"] or b"", entry["transfers"] or b""):
        digest.update(struct.pack("<q", len(part)))
        digest.update(part)
    return digest.digest()


def _indexed(transfer: Transfer) -> dict[str, Any]:
    values = asdict(transfer)
    return {
        column.name: values[column.name] for column in tables.transfers.c if column.name != "tsn"
    }


def _encode(transfers: Sequence[Transfer], first_tsn: int, booked_at: datetime) -> bytes | None:
    if not transfers:
        return None
    columns = []
    for field in TRANSFERS:
        if field.name == "tsn":
            column = pa.array(range(first_tsn, first_tsn + len(transfers)), field.type)
        elif field.name == "booked_at":
            column = pa.array([booked_at] * len(transfers), field.type)
        elif field.name == "amount":
            column = money_array([transfer.amount_pico for transfer in transfers])
        else:
            column = pa.array([getattr(t, field.name) for t in transfers], field.type)
        columns.append(column)
    return encode(pa.RecordBatch.from_arrays(columns, schema=TRANSFERS))
