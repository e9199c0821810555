"""Proofs: takes a picture of the books and has it verified; proves that a row is in the log."""

import asyncio
import json
import logging
import os
import pickle
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import Connection, Row, select

from market.config import Config
from market.errors import MarketFault, NotFound
from market.ledger import manifest, tables
from market.ledger.compaction import require_rows, rows_in
from market.ledger.digest import leaf_hashes, map_text, row_path
from market.ledger.journal import chain_head
from market.ledger.log import inclusion_path
from market.ledger.manifest import Dataset, Part
from market.ledger.sealing import Sealer
from market.ledger.settling import FILE, settlement_rows
from market.ledger.snapshot import retrying
from market.ledger.store import LedgerStore
from market.ledger.verify import Picture
from market.ledger.writer import Writer
from market.pricing import to_pico
from market.storage import to_micros

logger = logging.getLogger(__name__)

CHAIN_AT_ONCE = 64
PICTURE = ".picture"
VERIFY_TIMEOUT_S = 4 * 3600


class Auditor:
    """Checks the ledger against itself; holds nothing but how to reach it."""

    def __init__(self, config: Config, writer: Writer, store: LedgerStore, sealer: Sealer) -> None:
        self._config = config
        self._writer = writer
        self._store = store
        self._sealer = sealer

    def clear(self) -> None:
        """Delete pictures of the books that a killed process left."""
        for picture in self._config.state_dir.glob(f"*{PICTURE}"):
            picture.unlink()

    async def verify(self) -> dict[str, Any]:
        """Recompute everything; ``finding`` is None or the first thing that is wrong."""
        async with self._sealer.files_stay:
            picture = await self._writer.submit(self._picture)
            broken = await self._check_chain(picture)
            report = await self._in_own_process(picture)
            strangers = await self._writer.submit(lambda c: _unknown_files(c, report.pop("newer")))
        if broken is not None:
            report["finding"] = {"where": "journal", "row": None, "reason": broken}
        elif report["finding"] is None and strangers:
            reason = "this file is not in the manifest"
            report["finding"] = {"where": strangers[0], "row": None, "reason": reason}
        if report["finding"] is not None:
            logger.critical("ALARM ledger verify: %s", report["finding"])
        return report

    async def prove(self, request_id: str, size: int | None) -> dict[str, Any]:
        """That a request's row is in the ledger: row, paths, signed checkpoint.

        ``size`` chooses a checkpoint that was signed before, for who kept it.
        ``scripts/verify_proof.py`` checks the proof. Raises NotFound.
        """
        await self._sealer.publish()
        checkpoint = await (self._sealer.sign() if size is None else self._signed(size))
        size = int(checkpoint.split("\n")[1])
        async with self._sealer.files_stay:
            parts = await self._writer.submit(lambda c: manifest.published(c, Dataset.USAGE))
            found = await asyncio.to_thread(self._find, parts, request_id)
        if found is None:
            raise NotFound(f"no request {request_id!r} is on record", code="request_not_found")
        part, rows, index = found
        leaves = await self._writer.submit(lambda c: manifest.leaves_from(c, 0))
        assert part.leaf is not None
        if part.leaf >= size:
            raise NotFound(f"request {request_id} was recorded after checkpoint {size}")
        path = inclusion_path(leaves[:size], part.leaf)
        return {
            "row": plain_row(rows.slice(index, 1)),
            "row_index": index,
            "row_path": row_path(leaf_hashes(rows), index),
            "part": part.entry(),
            "leaf_index": part.leaf,
            "leaf_path": [digest.hex() for digest in path],
            "checkpoint": checkpoint,
            "public_key": self._sealer.signer.verifier(),
        }

    async def _signed(self, size: int) -> str:
        query = select(tables.checkpoints.c.note).where(tables.checkpoints.c.size == size)
        note = await self._writer.submit(lambda c: c.execute(query).scalar())
        if note is None:
            raise NotFound(f"no checkpoint of {size} parts was signed", code="checkpoint_not_found")
        return str(note)

    def _find(
        self, parts: Sequence[Part], request_id: str
    ) -> tuple[Part, pa.RecordBatch, int] | None:
        """The part with the request's own row, that part's rows, and the row's place."""

        def search() -> tuple[Part, pa.RecordBatch, int] | None:
            """Newest files first; again if one goes away."""
            paths: dict[Path, list[Part]] = {}
            for part in parts:
                paths.setdefault(self._sealer.publisher.path(part), []).append(part)
            for path, inside in reversed(paths.items()):
                columns = manifest.read_columns(path, ["lsn", "request_id", "kind"])
                own = pc.and_(
                    pc.equal(columns["request_id"], request_id), pc.equal(columns["kind"], "tokens")
                )
                lsns = columns["lsn"].filter(own).to_pylist()
                if lsns:
                    for part, rows in zip(inside, rows_in(path, inside), strict=True):
                        if part.lo <= lsns[0] <= part.hi:
                            require_rows(part, rows)
                            return part, rows, lsns[0] - part.lo
            return None

        return retrying(search)

    def _picture(self, connection: Connection) -> Picture:
        state = self._store.state
        held: dict[str, int] = {}
        for hold in self._store.open_holds(connection):
            held[hold.account_id] = held.get(hold.account_id, 0) + hold.left_pico
        parts = {dataset: manifest.published(connection, dataset) for dataset in Dataset}
        live = {}
        for dataset, sealed in parts.items():
            after = sealed[-1].hi if sealed else 0
            entries = manifest.entries_after(connection, dataset, after)
            live[dataset] = manifest.entries_table(dataset, entries)
        leaves = select(tables.parts.c.leaf, tables.parts.c.leaf_hash)
        stored = connection.execute(leaves.where(tables.parts.c.leaf.is_not(None)))
        return Picture(
            ledger_dir=self._config.ledger_dir,
            settlement_files={
                row.period: (self._config.statements_dir / row.period / FILE, row.sha256)
                for row in settlement_rows(connection)
            },
            parts=parts,
            leaf_hashes={row.leaf: row.leaf_hash for row in stored},
            live=live,
            cards=dict(state.cards),
            accounts=self._store.accounts(connection),
            held=held,
            marks={name: (mark.epoch, mark.next_seq) for name, mark in state.producers.items()},
            lease_totals=dict(state.leases),
            checkpoints=[
                (row.size, row.root, row.note)
                for row in connection.execute(select(tables.checkpoints))
            ],
            public_key=self._sealer.signer.public.public_bytes_raw(),
        )

    async def _check_chain(self, picture: Picture) -> str | None:
        """Recompute the hash chain over every entry that the journal still has.

        Where a part was sealed, the chain must have the head that went into the log with it.
        """
        sealed = {
            (part.dataset, part.hi): part.head for parts in picture.parts.values() for part in parts
        }
        counters = self._store.state.counters
        entry, head = counters.pruned_entry, counters.pruned_head
        end = counters.next_entry - 1
        while entry < end:
            rows = await self._writer.submit(lambda c: _entries(c, entry))  # noqa: B023
            if not rows:
                return f"entry {entry + 1} is missing"
            for row in rows:
                if row.entry != entry + 1:
                    return f"entry {entry + 1} is missing"
                head = await asyncio.to_thread(chain_head, head, row._mapping)
                if head != row.head:
                    return f"entry {row.entry} was changed after it was booked"
                for last in _sealed_ends(row):
                    if sealed.get(last, head) != head:
                        return f"entry {row.entry} is not the one sealed with row {last[1]}"
                entry = row.entry
        return None

    async def _in_own_process(self, picture: Picture) -> dict[str, Any]:
        with tempfile.NamedTemporaryFile(dir=self._config.state_dir, suffix=PICTURE) as file:
            await asyncio.to_thread(pickle.dump, picture, file)
            file.flush()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "market.ledger.verify", file.name),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            try:
                async with asyncio.timeout(VERIFY_TIMEOUT_S):
                    out, errors = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if process.returncode not in (0, 1) or not out:
            raise MarketFault(f"verify did not end: {errors.decode()[-2000:]}")
        report: dict[str, Any] = json.loads(out)
        return report


def _sealed_ends(entry: Row[Any]) -> list[tuple[Dataset, int]]:
    """The last rows that an entry has of each dataset."""
    ends = []
    if entry.lsn_hi >= entry.lsn_lo:
        ends.append((Dataset.USAGE, entry.lsn_hi))
    if entry.tsn_hi >= entry.tsn_lo:
        ends.append((Dataset.TRANSFERS, entry.tsn_hi))
    return ends


def _unknown_files(connection: Connection, paths: Sequence[str]) -> list[str]:
    """Those of ``paths`` that no part of the manifest lives in or is about to."""
    known = set(connection.execute(select(tables.parts.c.file)).scalars()) if paths else set()
    return [path for path in paths if Path(path).name not in known]


def _entries(connection: Connection, after: int) -> Sequence[Any]:
    journal = tables.journal
    query = select(journal).where(journal.c.entry > after).order_by(journal.c.entry)
    return connection.execute(query.limit(CHAIN_AT_ONCE)).all()


def plain_row(row: pa.RecordBatch) -> list[list[Any]]:
    """A row as [name, kind, value], kinds and values as the digest's encoding needs them."""
    values = []
    for name, column in zip(row.schema.names, row.columns, strict=True):
        kind, value = _plain(column.type, column[0].as_py())
        values.append([name, kind, value])
    return values


def _plain(type_: pa.DataType, value: Any) -> tuple[str, Any]:
    if pa.types.is_map(type_):
        return "text", map_text(value)
    if pa.types.is_string(type_):
        return "text", value
    if pa.types.is_timestamp(type_):
        return "int64", None if value is None else to_micros(value)
    if pa.types.is_decimal(type_):
        return "int128", None if value is None else str(to_pico(value))
    return str(type_), value
