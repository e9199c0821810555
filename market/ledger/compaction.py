"""Compaction: the parts of a closed day become one file, in one instant.

A closed day is one whose rows are all public and which can get no more (booking times never go
back). Its folder is exchanged with one that holds the compacted file; the old folder stays in a
grave for a while, so that a reader that had listed it gets its rows or "file not found", never a
part of them. The exchange happens only after row counts, sums and row digests are proven equal.
"""

import logging
import shutil
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Connection, delete, select, update

from market import crash
from market.errors import MarketFault
from market.ledger import files, manifest, tables
from market.ledger.digest import leaf_hashes, rows_root
from market.ledger.manifest import KEYS, Dataset, Part
from market.ledger.publisher import Publisher, amount_pico, writer
from market.storage import from_micros, to_micros

logger = logging.getLogger(__name__)

GRACE = timedelta(minutes=15)


@dataclass(frozen=True, slots=True)
class Compacted:
    """A day's file that is about to take the place of its parts."""

    dataset: Dataset
    day: date
    file: str
    sha256: str


class Compactor:
    """Works in ``staging`` beside the publisher, on the same file system as the ledgers."""

    def __init__(self, publisher: Publisher, staging: Path) -> None:
        self._publisher = publisher
        self._staging = staging / "days"
        self._grave = staging / "grave"
        self._staging.mkdir(parents=True, exist_ok=True)
        self._grave.mkdir(parents=True, exist_ok=True)
        self.possible = files.can_exchange(staging)
        if not self.possible:
            logger.warning("%s cannot exchange folders: days are not compacted", staging)

    # -- SQL side: inside the writer's transaction ---------------------------------------------

    def closed_days(self, connection: Connection, today: date) -> list[list[Part]]:
        """The parts of each day that is closed and has more than one file, oldest first."""
        days: dict[tuple[Dataset, date], list[Part]] = defaultdict(list)
        for dataset in Dataset:
            for part in manifest.published(connection, dataset):
                days[dataset, part.day].append(part)
            pending = manifest.sealable(connection, dataset)
            if pending is not None:  # the first unsealed row's day is open, however old it is
                today = min(today, pending.entries[0].booked_at.date())
        return [
            parts
            for (_, day), parts in sorted(days.items(), key=lambda item: item[0][1])
            if day < today and len({part.file for part in parts}) > 1
        ]

    def prepare(self, connection: Connection, compacted: Compacted) -> None:
        """Record that the day's folder is about to be exchanged."""
        connection.execute(
            tables.compactions.insert().values(
                dataset=compacted.dataset,
                date=compacted.day.isoformat(),
                file=compacted.file,
                sha256=compacted.sha256,
            )
        )

    def commit(self, connection: Connection, compacted: Compacted) -> None:
        """Record where the day's rows are now."""
        where = (
            tables.parts.c.dataset == compacted.dataset,
            tables.parts.c.date == compacted.day.isoformat(),
        )
        values = {"file": compacted.file, "sha256": compacted.sha256}
        connection.execute(update(tables.parts).where(*where).values(values))
        connection.execute(delete(tables.compactions))

    def repair(self, connection: Connection) -> None:
        """Finish or forget an exchange that a crash left half done."""
        for row in connection.execute(select(tables.compactions)).all():
            day = date.fromisoformat(row.date)
            compacted = Compacted(Dataset(row.dataset), day, row.file, row.sha256)
            public = self._publisher.folder(compacted.dataset, day)
            if (public / compacted.file).exists():
                files.sync_folders(public.parent, self._staged(compacted.dataset, day).parent)
                self.commit(connection, compacted)
            else:
                connection.execute(delete(tables.compactions))

    # -- file side -----------------------------------------------------------------------------

    def build(self, parts: Sequence[Part]) -> Compacted:
        """Write the day's file outside the public folder and prove it equal to its parts.

        Raises MarketFault if a part or the new file has not the rows that the manifest says.
        """
        dataset, day = parts[0].dataset, parts[0].day
        folder = self._staged(dataset, day)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        name = f"compact-{parts[0].lo:012d}-{parts[-1].hi:012d}.parquet"
        with writer(folder / name, dataset) as parquet:
            for part, rows in zip(parts, self._rows(parts), strict=True):
                require_rows(part, rows)
                parquet.write_batch(rows)
        files.sync_file(folder / name)
        files.sync_folders(folder, folder.parent)
        crash.reach("compact-built")
        for part, rows in zip(parts, rows_in(folder / name, parts), strict=True):
            require_rows(part, rows)
        return Compacted(dataset, day, name, files.sha256_of(folder / name))

    def exchange(self, compacted: Compacted) -> None:
        """Swap the day's public folder with the new one."""
        public = self._publisher.folder(compacted.dataset, compacted.day)
        staged = self._staged(compacted.dataset, compacted.day)
        files.exchange(staged, public)
        crash.reach("compact-exchanged")
        files.sync_folders(public.parent, staged.parent)

    def bury(self, now: datetime) -> None:
        """Put folders that were exchanged out, or never in, where they wait for their end."""
        for folder in sorted(self._staging.glob("*/date=*")):
            name = f"{folder.parent.name}-{folder.name}-{uuid.uuid4().hex[:8]}"
            folder.rename(self._grave / f"{name}@{to_micros(now + GRACE)}")
            crash.reach("compact-buried")

    def clear_graves(self, now: datetime) -> None:
        """Delete what no reader can be reading any more."""
        for grave in self._grave.iterdir():
            if from_micros(int(grave.name.rpartition("@")[2])) <= now:
                shutil.rmtree(grave)

    def _rows(self, parts: Sequence[Part]) -> Iterator[pa.RecordBatch]:
        by_file: dict[str, list[Part]] = defaultdict(list)
        for part in parts:
            by_file[part.file].append(part)
        for inside in by_file.values():
            yield from rows_in(self._publisher.path(inside[0]), inside)

    def _staged(self, dataset: Dataset, day: date) -> Path:
        return self._staging / dataset / f"date={day.isoformat()}"


def rows_in(path: Path, parts: Sequence[Part]) -> Iterator[pa.RecordBatch]:
    """The rows of each of ``parts``, which lie in this file in order; memory of a few parts.

    Raises MarketFault if the file ends too early or goes on after the last part.
    """
    schema = manifest.SCHEMAS[parts[0].dataset]
    wanted = iter(parts)
    part = next(wanted, None)
    waiting = schema.empty_table()
    with pq.ParquetFile(path) as file:
        if not file.schema_arrow.equals(schema):
            raise MarketFault(f"{path} has other columns than the ledger")
        for batch in file.iter_batches(batch_size=manifest.ROWS_PER_PART):
            waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
            while part is not None and waiting.num_rows >= part.rows:
                (rows,) = waiting.slice(0, part.rows).combine_chunks().to_batches()
                waiting = waiting.slice(part.rows)
                yield rows
                part = next(wanted, None)
    if part is not None:
        raise MarketFault(f"{path} ends before row {part.hi}: {waiting.num_rows} of {part.rows}")
    if waiting.num_rows:
        raise MarketFault(f"{path} has {waiting.num_rows} rows that the manifest does not know")


def require_rows(part: Part, rows: pa.RecordBatch) -> None:
    """Raises MarketFault unless ``rows`` are those that were sealed as ``part``."""
    key = rows[KEYS[part.dataset]]
    found = (key[0].as_py(), key[-1].as_py(), rows.num_rows, amount_pico(rows, part.dataset))
    if found != (part.lo, part.hi, part.rows, part.amount_pico):
        raise MarketFault(f"{part.file}: rows {found} where the manifest has {part.entry()}")
    if rows_root(leaf_hashes(rows)) != part.rows_root:
        raise MarketFault(f"{part.file}: rows {part.lo}..{part.hi} are not those that were sealed")
