"""The manifest in SQL: which rows are sealed in which part and file, and what is still to seal."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Connection, Row, Select, delete, func, select, update

from market.ledger import tables
from market.ledger.journal import transfers_batch
from market.ledger.log import leaf_bytes, leaf_hash
from market.ledger.schema import ENVELOPE, TRANSFERS, USAGE, decode

ROWS_PER_PART = 65_536
PREPARED, PUBLISHED = "prepared", "published"


class Dataset(StrEnum):
    """The public datasets; the value is the folder's name."""

    USAGE = "usage"
    TRANSFERS = "transfers"


SCHEMAS = {Dataset.USAGE: USAGE, Dataset.TRANSFERS: TRANSFERS}
KEYS = {Dataset.USAGE: "lsn", Dataset.TRANSFERS: "tsn"}
MONEY_COLUMNS = {Dataset.USAGE: "charge", Dataset.TRANSFERS: "amount"}


@dataclass(frozen=True, slots=True)
class Part:
    """Rows ``lo``..``hi`` of one booking date as they were sealed: a leaf of the log.

    ``head`` is the journal's chain after the last entry in it. ``file`` and ``sha256`` say where
    the rows are now; they are no part of the leaf, because compaction changes them.
    """

    dataset: Dataset
    lo: int
    hi: int
    day: date
    rows: int
    amount_pico: int
    rows_root: bytes
    head: bytes
    file: str
    sha256: str
    leaf: int | None = None

    def entry(self) -> dict[str, Any]:
        """What the log's leaf says."""
        return {
            "dataset": str(self.dataset),
            "lo": self.lo,
            "hi": self.hi,
            "date": self.day.isoformat(),
            "rows": self.rows,
            "amount_pico": str(self.amount_pico),
            "rows_root": self.rows_root.hex(),
            "head": self.head.hex(),
        }

    @property
    def leaf_hash(self) -> bytes:
        """The leaf's hash in the log."""
        return leaf_hash(leaf_bytes(self.entry()))


def part_name(lo: int, hi: int) -> str:
    """File name of a part, a pure function of its range."""
    return f"part-{lo:012d}-{hi:012d}.parquet"


@dataclass(frozen=True, slots=True)
class Sealable:
    """Journal entries that make the next part of a dataset."""

    dataset: Dataset
    entries: Sequence[Row[Any]]
    head: bytes

    def table(self) -> pa.Table:
        """The rows with every public column, in order."""
        return entries_table(self.dataset, self.entries)


def entries_table(dataset: Dataset, entries: Sequence[Row[Any]]) -> pa.Table:
    """Rows of journal entries, in order."""
    make = _usage_batch if dataset is Dataset.USAGE else _transfers_batch
    batches = [make(entry) for entry in entries]
    return pa.Table.from_batches(batches, SCHEMAS[dataset]).combine_chunks()


def read_columns(path: Path, columns: list[str]) -> pa.Table:
    """Some columns of one file, in order."""
    return pq.read_table(path, columns=columns, partitioning=None)


def _usage_batch(entry: Row[Any]) -> pa.RecordBatch:
    batch = decode(entry.usage)
    count = batch.num_rows
    envelope = {
        "lsn": pa.array(range(entry.lsn_lo, entry.lsn_lo + count), pa.int64()),
        "booked_at": pa.repeat(pa.scalar(entry.booked_at, USAGE.field("booked_at").type), count),
        "producer": pa.repeat(entry.producer, count),
        "epoch": pa.repeat(pa.scalar(entry.epoch, pa.int32()), count),
        "seq": pa.array(range(entry.first_seq, entry.first_seq + count), pa.int64()),
    }
    columns = [envelope[n] if n in ENVELOPE else batch[n] for n in USAGE.names]
    return pa.RecordBatch.from_arrays(columns, schema=USAGE)


def _transfers_batch(entry: Row[Any]) -> pa.RecordBatch:
    return transfers_batch(entry.transfers, entry.tsn_lo, entry.booked_at)


def sealed_until(connection: Connection, dataset: Dataset) -> int:
    """The last row that is public."""
    where = (tables.parts.c.dataset == dataset, tables.parts.c.state == PUBLISHED)
    return int(connection.execute(select(func.max(tables.parts.c.hi)).where(*where)).scalar() or 0)


def sealable(connection: Connection, dataset: Dataset) -> Sealable | None:
    """The next entries to seal: one booking date, about ROWS_PER_PART rows; None if none."""
    lo, hi = _range_columns(dataset)
    journal = tables.journal.c
    query = select(journal.entry, journal.booked_at, lo, hi).where(
        hi > sealed_until(connection, dataset), hi >= lo
    )
    first = last = None
    count = 0
    for row in connection.execute(query.order_by(journal.entry).limit(ROWS_PER_PART)):
        first = first or row
        if row.booked_at.date() != first.booked_at.date() or count >= ROWS_PER_PART:
            break
        count += row[3] - row[2] + 1
        last = row
    if first is None or last is None:
        return None
    entries = connection.execute(
        select(tables.journal)
        .where(journal.entry >= first.entry, journal.entry <= last.entry, hi >= lo)
        .order_by(journal.entry)
    ).all()
    return Sealable(dataset, entries, entries[-1].head)


def entries_after(
    connection: Connection, dataset: Dataset, after: int, most: int | None = None
) -> Sequence[Row[Any]]:
    """Journal entries with rows beyond ``after``, in order; at most ``most``."""
    lo, hi = _range_columns(dataset)
    query = select(tables.journal).where(hi > after, hi >= lo)
    return connection.execute(query.order_by(tables.journal.c.entry).limit(most)).all()


def first_unsealed_at(connection: Connection) -> datetime | None:
    """When the oldest usage row was booked that is not public yet."""
    journal = tables.journal.c
    query = select(func.min(journal.booked_at)).where(
        journal.lsn_hi > sealed_until(connection, Dataset.USAGE), journal.lsn_hi >= journal.lsn_lo
    )
    found: datetime | None = connection.execute(query).scalar()
    return found


def last_rows(connection: Connection) -> tuple[int, int]:
    """(lsn, tsn) of the last rows booked before the running transaction."""
    row = connection.execute(select(tables.counters)).one_or_none()
    return (0, 0) if row is None else (row.next_lsn - 1, row.next_tsn - 1)


def _range_columns(dataset: Dataset) -> tuple[Any, Any]:
    journal = tables.journal.c
    if dataset is Dataset.USAGE:
        return journal.lsn_lo, journal.lsn_hi
    return journal.tsn_lo, journal.tsn_hi


def prepare(connection: Connection, part: Part) -> None:
    """Record that ``part`` is staged and about to appear."""
    connection.execute(
        tables.parts.insert().values(
            dataset=part.dataset,
            lo=part.lo,
            hi=part.hi,
            date=part.day.isoformat(),
            rows=part.rows,
            amount_pico=part.amount_pico,
            rows_root=part.rows_root,
            head=part.head,
            file=part.file,
            sha256=part.sha256,
            state=PREPARED,
            leaf_hash=part.leaf_hash,
        )
    )


def confirm(connection: Connection, part: Part) -> None:
    """Record that ``part`` is public: it becomes the log's next leaf."""
    last = connection.execute(select(func.max(tables.parts.c.leaf))).scalar()
    leaf = 0 if last is None else last + 1
    connection.execute(update(tables.parts).where(*_is(part)).values(state=PUBLISHED, leaf=leaf))


def forget(connection: Connection, part: Part) -> None:
    """A prepared part that never became public: it is made again from the journal."""
    connection.execute(delete(tables.parts).where(*_is(part)))


def prepared(connection: Connection) -> list[Part]:
    """Parts that were about to become public when the process ended."""
    return _parts(connection, select(tables.parts).where(tables.parts.c.state == PREPARED))


def published(
    connection: Connection, dataset: Dataset, after: int = 0, until: int | None = None
) -> list[Part]:
    """Public parts in order that have rows in (after, until]."""
    parts = tables.parts
    query = select(parts).where(
        parts.c.dataset == dataset, parts.c.state == PUBLISHED, parts.c.hi > after
    )
    if until is not None:
        query = query.where(parts.c.lo <= until)
    return _parts(connection, query.order_by(parts.c.lo))


def count_on(connection: Connection, dataset: Dataset, day: date) -> int:
    """Number of parts of a booking date."""
    where = (tables.parts.c.dataset == dataset, tables.parts.c.date == day.isoformat())
    count = connection.execute(select(func.count()).select_from(tables.parts).where(*where))
    return int(count.scalar_one())


def leaves_from(connection: Connection, first: int) -> list[bytes]:
    """Leaf hashes of the log from leaf ``first`` on."""
    query = select(tables.parts.c.leaf_hash).where(tables.parts.c.leaf >= first)
    return list(connection.execute(query.order_by(tables.parts.c.leaf)).scalars())


def last_row_before(connection: Connection, dataset: Dataset, moment: datetime) -> int:
    """Number of the last public row whose booking date is before that of ``moment``."""
    parts = tables.parts
    query = select(func.max(parts.c.hi)).where(
        parts.c.dataset == dataset,
        parts.c.state == PUBLISHED,
        parts.c.date < moment.astimezone(UTC).date().isoformat(),
    )
    return int(connection.execute(query).scalar() or 0)


def _parts(connection: Connection, query: Select[Any]) -> list[Part]:
    return [part_from(row) for row in connection.execute(query)]


def part_from(row: Row[Any]) -> Part:
    """A part of its row."""
    return Part(
        Dataset(row.dataset),
        row.lo,
        row.hi,
        date.fromisoformat(row.date),
        row.rows,
        row.amount_pico,
        row.rows_root,
        row.head,
        row.file,
        row.sha256,
        row.leaf,
    )


def _is(part: Part) -> tuple[Any, Any]:
    return tables.parts.c.dataset == part.dataset, tables.parts.c.lo == part.lo
