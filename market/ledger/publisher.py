"""Publishing: journal entries -> immutable Parquet parts that plain readers may read any time.

Each step leaves a state that ``repair`` can finish: staged outside the public folder, re-read and
checked, recorded as prepared, renamed in without overwriting, recorded as published. Nothing but
finished ``*.parquet`` files ever exists under ``ledger/``.
"""

import shutil
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Connection

from market import crash
from market.errors import MarketFault
from market.ledger import files, manifest
from market.ledger.digest import leaf_hashes, rows_root
from market.ledger.manifest import KEYS, MONEY_COLUMNS, SCHEMAS, Dataset, Part, Sealable
from market.ledger.rating import money_sum

SEAL_INTERVAL_S = 5.0
FREE_PARTS = 800
SLOWDOWN_PARTS = 45
GENESIS = "part-genesis.parquet"

# Dictionary only where values repeat: on near-unique ids it makes pyarrow 20 times slower.
_DICTIONARY = {
    Dataset.USAGE: [
        *("producer", "kind", "tenant_id", "api_key_id", "model", "adapter", "lane"),
        *("deployment_id", "lease_id", "slice_id", "provider_id", "node_id", "gpu_type"),
        *("finish_reason", "usage_quality", "price_id", "currency"),
        *("input_tokens", "cached_input_tokens", "output_tokens", "claimed_output_tokens"),
        *("ttft_ms", "queue_ms"),
    ],
    Dataset.TRANSFERS: [
        *("kind", "debit_account", "credit_account", "currency", "reason", "made_by")
    ],
}
_DELTA = {
    Dataset.USAGE: [
        *("lsn", "booked_at", "epoch", "seq", "reverses_lsn", "gpu_milli", "started_at"),
        *("finished_at", "gpu_us", "duration_ms"),
    ],
    Dataset.TRANSFERS: ["tsn", "booked_at", "lsn_lo", "lsn_hi"],
}
# Ids differ from the one before in their last digits only. (Neither DuckDB nor Polars reads
# BYTE_STREAM_SPLIT or DELTA_BYTE_ARRAY of decimals.)
_ENCODINGS = {
    Dataset.USAGE: dict.fromkeys(_DELTA[Dataset.USAGE], "DELTA_BINARY_PACKED")
    | {"request_id": "DELTA_BYTE_ARRAY"},
    Dataset.TRANSFERS: dict.fromkeys(_DELTA[Dataset.TRANSFERS], "DELTA_BINARY_PACKED")
    | {"transfer_id": "DELTA_BYTE_ARRAY"},
}


def writer(path: Path, dataset: Dataset) -> pq.ParquetWriter:
    """A Parquet writer with the encodings of LEDGER.md 3.3."""
    return pq.ParquetWriter(
        path,
        SCHEMAS[dataset],
        compression="zstd",
        compression_level=3,
        use_dictionary=_DICTIONARY[dataset],
        column_encoding=_ENCODINGS[dataset],
        write_page_index=True,
        write_page_checksum=True,
    )


def seal_interval(parts_today: int) -> float:
    """Seconds until the next part: 5, then growing so that a busy day stays under 2,000 parts."""
    return SEAL_INTERVAL_S * (1 + max(0, parts_today - FREE_PARTS) / SLOWDOWN_PARTS)


def amount_pico(rows: pa.RecordBatch, dataset: Dataset) -> int:
    """Sum of the money column, exact."""
    return money_sum(rows[MONEY_COLUMNS[dataset]]) if rows.num_rows else 0


class Publisher:
    """Files under ``ledger`` (public) and ``staging`` (private, on the same file system)."""

    def __init__(self, ledger: Path, staging: Path) -> None:
        self._ledger = ledger
        self._staging = staging / "parts"
        self._staging.mkdir(parents=True, exist_ok=True)

    def path(self, part: Part) -> Path:
        """The file in which a part's rows are now."""
        return self.folder(part.dataset, part.day) / part.file

    def folder(self, dataset: Dataset, day: date) -> Path:
        """The public folder of a booking date."""
        return self._ledger / dataset / f"date={day.isoformat()}"

    def repair(self, connection: Connection) -> None:
        """Finish or forget what a crash left half done, and clear the staging folder."""
        for part in manifest.prepared(connection):
            staged, target = self._staged(part), self.path(part)
            if not target.exists() and staged.exists() and files.sha256_of(staged) == part.sha256:
                self.link(part)
                crash.reach("repair-renamed")
            if target.exists() and files.sha256_of(target) == part.sha256:
                files.sync_folders(target.parent)
                manifest.confirm(connection, part)
            else:
                target.unlink(missing_ok=True)
                manifest.forget(connection, part)
        for leftover in self._staging.iterdir():
            leftover.unlink()

    def genesis(self, dataset: Dataset, day: date) -> None:
        """An empty part, so that an empty ledger can be read and has its schema."""
        folder = self._ledger / dataset
        if any(folder.rglob("*.parquet")):
            return
        staged = self._staging / f"{dataset}-{GENESIS}"
        writer(staged, dataset).close()
        files.sync_file(staged)
        target = self.folder(dataset, day) / GENESIS
        target.parent.mkdir(parents=True, exist_ok=True)
        files.move_new(staged, target)
        files.sync_folders(target.parent, folder, self._ledger)

    def stage(self, sealable: Sealable) -> Part:
        """Write rows outside the public folder, read them back and compare."""
        dataset, rows = sealable.dataset, sealable.table()
        key = rows.column(KEYS[dataset])
        day: datetime = rows.column("booked_at")[0].as_py()
        lo, hi = key[0].as_py(), key[-1].as_py()
        name = manifest.part_name(lo, hi)
        part = Part(dataset, lo, hi, day.date(), rows.num_rows, 0, b"", sealable.head, name, "")
        staged = self._staged(part)
        with writer(staged, dataset) as parquet:
            parquet.write_table(rows)
        crash.reach("staged")
        files.sync_file(staged)
        written = pq.read_table(staged)
        if not written.equals(rows):
            raise MarketFault(f"{staged} reads back differently than it was written")
        (batch,) = written.combine_chunks().to_batches()
        return replace(
            part,
            amount_pico=amount_pico(batch, dataset),
            rows_root=rows_root(leaf_hashes(batch)),
            sha256=files.sha256_of(staged),
        )

    def link(self, part: Part) -> None:
        """Make a staged part public. Raises FileExistsError rather than overwrite."""
        target = self.path(part)
        target.parent.mkdir(parents=True, exist_ok=True)
        files.move_new(self._staged(part), target)
        crash.reach("renamed")
        files.sync_folders(target.parent, target.parent.parent, self._staging)
        crash.reach("synced")

    def free_bytes(self) -> int:
        """Room on the disk of the ledgers."""
        return shutil.disk_usage(self._staging).free

    def _staged(self, part: Part) -> Path:
        return self._staging / f"{part.dataset}-{part.file}"
