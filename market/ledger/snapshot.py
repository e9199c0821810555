"""An exact view of the ledgers at one instant, for queries: files and rows that are in none."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import duckdb
import pyarrow as pa
from sqlalchemy import Connection, Row

from market.ledger import manifest
from market.ledger.manifest import SCHEMAS, Dataset
from market.ledger.publisher import Publisher
from market.types import RateCard

TRIES = 5
MEMORY_LIMIT = "512MB"
THREADS = 2

Result = TypeVar("Result")
DuckDBError = duckdb.IOException


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Files to read and journal entries that are in none of them, per dataset."""

    files: dict[Dataset, list[Path]]
    entries: dict[Dataset, Sequence[Row[tuple[object, ...]]]]
    cards: dict[str, RateCard]
    lsn: int
    tsn: int

    def live(self, dataset: Dataset) -> pa.Table:
        """The rows that are in no file."""
        entries = self.entries[dataset]
        if not entries:
            return SCHEMAS[dataset].empty_table()
        return manifest.entries_table(dataset, entries)

    def connect(
        self, spill: Path | None = None
    ) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """DuckDB with the views ``usage`` and ``transfers`` and the table ``rate_cards``.

        Its memory is bounded; what does not fit goes to the folder ``spill``.
        """
        settings: dict[str, str | int] = {"threads": THREADS, "memory_limit": MEMORY_LIMIT}
        if spill is not None:
            settings["temp_directory"] = str(spill)
        connection = duckdb.connect(config=settings)
        for dataset in Dataset:
            connection.register(f"live_{dataset}", self.live(dataset))
            source = f"SELECT * FROM live_{dataset}"
            if self.files[dataset]:
                names = ", ".join(_quoted(str(path)) for path in self.files[dataset])
                source += (
                    f" UNION ALL SELECT * FROM read_parquet([{names}], hive_partitioning = false)"
                )
            connection.execute(f"CREATE VIEW {dataset} AS {source}")
        connection.register("rate_cards", cards_table(self.cards))
        return closing(connection)


def take(connection: Connection, publisher: Publisher, cards: dict[str, RateCard]) -> Snapshot:
    """The ledgers as the running transaction sees them."""
    files: dict[Dataset, list[Path]] = {}
    entries: dict[Dataset, Sequence[Row[tuple[object, ...]]]] = {}
    for dataset in Dataset:
        parts = manifest.published(connection, dataset)
        files[dataset] = list(dict.fromkeys(publisher.path(part) for part in parts))
        sealed = parts[-1].hi if parts else 0
        entries[dataset] = manifest.entries_after(connection, dataset, sealed)
    lsn, tsn = manifest.last_rows(connection)
    return Snapshot(files, entries, dict(cards), lsn, tsn)


def gone(error: Exception) -> bool:
    """Whether a query failed because compaction took a file away: the next snapshot has it."""
    return isinstance(error, FileNotFoundError) or (
        isinstance(error, duckdb.IOException)
        and any(words in str(error) for words in ("No files found", "No such file"))
    )


def retrying(attempt: Callable[[], Result]) -> Result:
    """Run ``attempt`` again while files go away under it. Raises what the last try raised."""
    for _ in range(TRIES - 1):
        try:
            return attempt()
        except (FileNotFoundError, duckdb.IOException) as error:
            if not gone(error):
                raise
    return attempt()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def cards_table(cards: dict[str, RateCard]) -> pa.Table:
    """Rate cards as the queries see them; amounts in pico units."""
    pico = pa.decimal128(38, 0)
    schema = pa.schema(
        [
            ("price_id", pa.string()),
            ("model", pa.string()),
            ("input_pico", pico),
            ("cached_input_pico", pico),
            ("output_pico", pico),
            ("gpu_hour_pico", pico),
            ("currency", pa.string()),
            ("valid_from", pa.timestamp("us", tz="UTC")),
        ]
    )
    values = [{name: getattr(card, name) for name in schema.names} for card in cards.values()]
    return pa.Table.from_pylist(values, schema=schema)
