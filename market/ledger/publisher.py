"""Publishing: SQL rows -> immutable Parquet parts that plain readers may read at any moment.

Each step leaves a state that ``repair`` can finish: staged outside the public folder, re-read and
checked, recorded as prepared, linked in without overwriting, recorded as published. Nothing but
finished ``*.parquet`` files ever exists under ``ledger/``.
"""

import hashlib
import os
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Connection, delete, func, select, update

from market.errors import MarketFault
from market.ledger import tables
from market.ledger.schema import TRANSFERS, USAGE, decode_batch
from market.pricing import to_decimal

SEAL_INTERVAL_S = 5.0
FREE_PARTS = 800
SLOWDOWN_PARTS = 45
ROWS_PER_PART = 65_536


class Dataset(StrEnum):
    """The public datasets; the value is the folder's name."""

    USAGE = "usage"
    TRANSFERS = "transfers"


SCHEMAS = {Dataset.USAGE: USAGE, Dataset.TRANSFERS: TRANSFERS}
KEYS = {Dataset.USAGE: "lsn", Dataset.TRANSFERS: "tsn"}

# Dictionary only where values repeat: on near-unique ones it makes pyarrow 20 times slower.
_DICTIONARY = {
    Dataset.USAGE: [
        *("producer", "kind", "tenant_id", "api_key_id", "model", "adapter", "lane"),
        *("deployment_id", "lease_id", "slice_id", "provider_id", "node_id", "gpu_type"),
        *("finish_reason", "usage_quality", "price_id", "currency"),
    ],
    Dataset.TRANSFERS: [
        *("kind", "debit_account", "credit_account", "currency", "reason", "made_by")
    ],
}
_DELTA = {
    Dataset.USAGE: [
        *("lsn", "booked_at", "epoch", "seq", "reverses_lsn", "gpu_milli", "started_at"),
        *("finished_at", "input_tokens", "cached_input_tokens", "output_tokens"),
        *("claimed_output_tokens", "gpu_us", "queue_ms", "ttft_ms", "duration_ms"),
    ],
    Dataset.TRANSFERS: ["tsn", "booked_at", "lsn_lo", "lsn_hi"],
}


@dataclass(frozen=True, slots=True)
class Part:
    """A published or prepared file: rows ``lo``..``hi`` of one booking date."""

    dataset: Dataset
    lo: int
    hi: int
    date: date
    rows: int
    sha256: str

    @property
    def name(self) -> str:
        """File name, a pure function of the range."""
        return f"part-{self.lo:012d}-{self.hi:012d}.parquet"


def seal_interval(parts_today: int) -> float:
    """Seconds until the next part: 5, then growing so that a busy day stays under 2,000 parts."""
    return SEAL_INTERVAL_S * (1 + max(0, parts_today - FREE_PARTS) / SLOWDOWN_PARTS)


class Publisher:
    """Files under ``ledger`` (public) and ``staging`` (private, on the same file system)."""

    def __init__(self, ledger: Path, staging: Path) -> None:
        self._ledger = ledger
        self._staging = staging
        staging.mkdir(parents=True, exist_ok=True)

    def path(self, part: Part) -> Path:
        """Where a part is published."""
        return self._ledger / part.dataset / f"date={part.date.isoformat()}" / part.name

    # -- SQL side: each of these runs inside the writer's transaction --------------------------

    def pending(self, connection: Connection, dataset: Dataset) -> pa.Table | None:
        """Rows not yet published, of one booking date; None if there are none."""
        published = _published(connection, dataset)
        if dataset is Dataset.USAGE:
            return _pending_usage(connection, published)
        return _pending_transfers(connection, published)

    def live(self, connection: Connection, dataset: Dataset) -> tuple[list[Path], pa.Table]:
        """An exact snapshot: the files published so far and the rows that are in none of them."""
        where = (tables.parts.c.dataset == dataset, tables.parts.c.state == "published")
        rows = connection.execute(select(tables.parts).where(*where).order_by(tables.parts.c.lo))
        files = [self.path(_part(row._mapping)) for row in rows]
        return files, _rows_after(connection, dataset, _published(connection, dataset))

    def prepare(self, connection: Connection, part: Part) -> None:
        """Record that ``part`` is staged and about to appear."""
        connection.execute(
            tables.parts.insert().values(
                dataset=part.dataset,
                lo=part.lo,
                hi=part.hi,
                date=part.date.isoformat(),
                name=part.name,
                rows=part.rows,
                sha256=part.sha256,
                state="prepared",
            )
        )

    def confirm(self, connection: Connection, part: Part) -> None:
        """Record that ``part`` is public."""
        connection.execute(
            update(tables.parts)
            .where(tables.parts.c.dataset == part.dataset, tables.parts.c.lo == part.lo)
            .values(state="published")
        )

    def parts_on(self, connection: Connection, dataset: Dataset, day: date) -> int:
        """Number of parts of a booking date."""
        where = (tables.parts.c.dataset == dataset, tables.parts.c.date == day.isoformat())
        count = connection.execute(select(func.count()).select_from(tables.parts).where(*where))
        return int(count.scalar_one())

    def repair(self, connection: Connection) -> None:
        """Finish or forget what a crash left half done, and clear the staging folder."""
        prepared = tables.parts.c.state == "prepared"
        for row in connection.execute(select(tables.parts).where(prepared)).all():
            part = _part(row._mapping)
            staged = self._staged(part)
            if not self.path(part).exists() and staged.exists() and _digest(staged) == part.sha256:
                self.link(part)
            if self.path(part).exists():
                self.confirm(connection, part)
            else:
                where = (tables.parts.c.dataset == part.dataset, tables.parts.c.lo == part.lo)
                connection.execute(delete(tables.parts).where(*where))
        for leftover in self._staging.iterdir():
            leftover.unlink()

    # -- file side -----------------------------------------------------------------------------

    def genesis(self, dataset: Dataset, day: date) -> None:
        """An empty part, so that an empty ledger can be read and has its schema."""
        folder = self._ledger / dataset
        if any(folder.rglob("*.parquet")):
            return
        empty = SCHEMAS[dataset].empty_table()
        staged = self._staging / f"{dataset}-genesis.parquet"
        _write(empty, staged, dataset)
        target = folder / f"date={day.isoformat()}" / "part-genesis.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(staged, target)
        _sync_folders(target.parent, folder, self._ledger)

    def stage(self, dataset: Dataset, rows: pa.Table) -> Part:
        """Write rows outside the public folder, read them back and compare."""
        key = rows.column(KEYS[dataset])
        day: datetime = rows.column("booked_at")[0].as_py()
        lo, hi = key[0].as_py(), key[-1].as_py()
        part = Part(dataset, lo, hi, day.date(), rows.num_rows, sha256="")
        staged = self._staged(part)
        _write(rows, staged, dataset)
        if not pq.read_table(staged).equals(rows):
            raise MarketFault(f"{staged} reads back differently than it was written")
        return Part(dataset, lo, hi, day.date(), rows.num_rows, _digest(staged))

    def link(self, part: Part) -> None:
        """Make a staged part public. Raises FileExistsError rather than overwrite."""
        target = self.path(part)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(self._staged(part), target)
        _sync_folders(target.parent, target.parent.parent)
        self._staged(part).unlink()

    def _staged(self, part: Part) -> Path:
        return self._staging / f"{part.dataset}-{part.name}"


def _published(connection: Connection, dataset: Dataset) -> int:
    where = (tables.parts.c.dataset == dataset, tables.parts.c.state == "published")
    return int(connection.execute(select(func.max(tables.parts.c.hi)).where(*where)).scalar() or 0)


def _pending_usage(connection: Connection, published: int) -> pa.Table | None:
    query = select(tables.journal).where(tables.journal.c.lsn_lo > published)
    batches: list[pa.Table] = []
    day: date | None = None
    count = 0
    for row in connection.execute(query.order_by(tables.journal.c.lsn_lo)):
        day = day or row.booked_at.date()
        if row.booked_at.date() != day or count >= ROWS_PER_PART:
            break
        batches.append(journal_table(row.lsn_lo, row.booked_at, row.batch))
        count += batches[-1].num_rows
    return pa.concat_tables(batches).combine_chunks() if batches else None


def journal_table(lsn_lo: int, booked_at: datetime, batch: bytes) -> pa.Table:
    """A journalled batch with the columns the ledger adds."""
    table = pa.Table.from_batches([decode_batch(batch)])
    lsn = pa.array(range(lsn_lo, lsn_lo + table.num_rows), type=pa.int64())
    booked = pa.array([booked_at] * table.num_rows, type=USAGE.field("booked_at").type)
    return pa.Table.from_arrays([lsn, booked, *table.columns], schema=USAGE)


def _pending_transfers(connection: Connection, published: int) -> pa.Table | None:
    query = select(tables.transfers).where(tables.transfers.c.tsn > published)
    rows: list[dict[str, object]] = []
    for row in connection.execute(query.order_by(tables.transfers.c.tsn).limit(ROWS_PER_PART)):
        if rows and row.booked_at.date() != rows[0]["booked_at"].date():  # type: ignore[attr-defined]
            break
        values = dict(row._mapping)
        values["amount"] = to_decimal(values.pop("amount_pico"))
        rows.append(values)
    return pa.Table.from_pylist(rows, schema=TRANSFERS) if rows else None


def _rows_after(connection: Connection, dataset: Dataset, published: int) -> pa.Table:
    if dataset is Dataset.TRANSFERS:
        found = _pending_transfers(connection, published)
        return TRANSFERS.empty_table() if found is None else found
    query = select(tables.journal).where(tables.journal.c.lsn_lo > published)
    found_rows = connection.execute(query.order_by(tables.journal.c.lsn_lo)).all()
    batches = [journal_table(row.lsn_lo, row.booked_at, row.batch) for row in found_rows]
    return pa.concat_tables([USAGE.empty_table(), *batches])


def _part(values: object) -> Part:
    row = dict(values)  # type: ignore[call-overload]
    day = date.fromisoformat(row["date"])
    return Part(Dataset(row["dataset"]), row["lo"], row["hi"], day, row["rows"], row["sha256"])


def _write(rows: pa.Table, path: Path, dataset: Dataset) -> None:
    pq.write_table(
        rows,
        path,
        compression="zstd",
        compression_level=3,
        use_dictionary=_DICTIONARY[dataset],
        column_encoding=dict.fromkeys(_DELTA[dataset], "DELTA_BINARY_PACKED"),
        write_page_index=True,
        write_page_checksum=True,
    )
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folders(*folders: Path) -> None:
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
