"""The journal: what was booked, in order, chained by hashes. Parquet is published from it."""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import msgspec
import pyarrow as pa
from sqlalchemy import Connection

from market.accounts import Transfer, TransferKind
from market.ledger import tables
from market.ledger.schema import TRANSFERS, money_array
from market.ledger.state import Counters
from market.storage import to_micros

# Transfers with an id of the caller's: kept by id, so that asking again books nothing.
_ASKED_KINDS = frozenset(
    {TransferKind.DEPOSIT, TransferKind.FEE, TransferKind.RESALE, TransferKind.SETTLE}
)


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
        "transfers": encode_transfers(transfers),
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


def encode_transfers(transfers: Sequence[Transfer]) -> bytes | None:
    """Transfers as the journal keeps them; amounts as text, because they may exceed 64 bits."""
    if not transfers:
        return None
    return _pack(
        [
            (
                *(t.transfer_id, t.kind, t.debit_account, t.credit_account, str(t.amount_pico)),
                *(t.currency, t.reason, t.made_by, t.lsn_lo, t.lsn_hi),
            )
            for t in transfers
        ]
    )


def transfers_batch(content: bytes, first_tsn: int, booked_at: datetime) -> pa.RecordBatch:
    """The public rows of an entry's transfers."""
    rows = msgspec.msgpack.decode(content)
    columns = dict(zip(_STORED, zip(*rows, strict=True), strict=True))
    count = len(rows)
    arrays = []
    for field in TRANSFERS:
        if field.name == "tsn":
            array = pa.array(range(first_tsn, first_tsn + count), field.type)
        elif field.name == "booked_at":
            array = pa.repeat(pa.scalar(booked_at, field.type), count)
        elif field.name == "amount":
            array = money_array([int(text) for text in columns["amount"]])
        else:
            array = pa.array(columns[field.name], field.type)
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=TRANSFERS)


_pack = msgspec.msgpack.Encoder().encode
_STORED = [field.name for field in TRANSFERS if field.name not in ("tsn", "booked_at")]
