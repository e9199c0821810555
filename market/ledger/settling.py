"""Settlement and statements: reads sealed rows by manifest, writes files, books the transfers."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Connection, Row, select

from market import crash, when
from market import settlement as rules
from market.config import Config
from market.errors import InvalidRequest, MarketFault
from market.ledger import files, manifest, tables
from market.ledger.manifest import Dataset, Part
from market.ledger.schema import MONEY
from market.ledger.sealing import Sealer
from market.ledger.snapshot import MEMORY_LIMIT, THREADS, gone
from market.ledger.store import LedgerStore
from market.ledger.writer import Writer
from market.metering import LENT_BY
from market.ports import Clock
from market.pricing import format_money, to_decimal, to_pico
from market.settlement import Line, Settlement

logger = logging.getLogger(__name__)

TRIES = 5
FILE = "settlement.parquet"
_TEXTS = ("tenant_id", "provider_id", "model", "lane", "kind", "price_id", "currency", "lent_by")
_COUNTS = ("rows", "input_tokens", "cached_input_tokens", "output_tokens", "gpu_us")
LINES = pa.schema(
    [(name, pa.string()) for name in _TEXTS]
    + [(name, pa.int64()) for name in _COUNTS]
    + [(name, MONEY) for name in ("charge", "fee", "share", "payout")]
)


class Settler:
    """Closes periods, one after the other."""

    def __init__(
        self, config: Config, clock: Clock, writer: Writer, store: LedgerStore, sealer: Sealer
    ) -> None:
        self._config = config
        self._clock = clock
        self._writer = writer
        self._store = store
        self._sealer = sealer
        self._lock = asyncio.Lock()

    async def settle(self, period: str, made_by: str, dry_run: bool) -> dict[str, Any]:
        """Close a month; with ``dry_run`` only say what would be settled now.

        Closing it again changes nothing. The caller has verified the ledger. Raises
        InvalidRequest for a month that is not over or before one that is settled, MarketFault if
        the same inputs give something else than before.
        """
        start, end = when.month(period)
        async with self._lock:
            await self._sealer.publish()
            known = await self._writer.submit(lambda c: settlement_row(c, period))
            if known is not None:
                return _summary(await self._again(known, dry_run), settled=True, created=False)
            bounds = await self._writer.submit(
                lambda c: self._bounds(c, period, (start, end), dry_run)
            )
            lines = await self._lines(*bounds)
            config = self._config
            settlement = rules.settle(period, bounds, config.fee_bps, lines, config.resale_bps)
            if not dry_run:
                crash.reach("settle-lines")
                await self._writer.on_files(write_lines, self.file(period), settlement)
                crash.reach("settle-file")
                await self._writer.submit(lambda c: self._book(c, settlement, made_by))
                crash.reach("settle-commit")
                await self._sealer.publish()
            return _summary(settlement, settled=not dry_run, created=not dry_run)

    def file(self, period: str) -> Path:
        """Where the lines of a settled period are."""
        return self._config.statements_dir / period / FILE

    async def _again(self, known: Row[Any], dry_run: bool) -> Settlement:
        bounds = (known.lsn_after, known.lsn_until)
        lines = await self._lines(*bounds)
        settlement = rules.settle(known.period, bounds, known.fee_bps, lines, known.resale_bps)
        path = self.file(known.period)
        stored = await asyncio.to_thread(stored_digest, path)
        if settlement.sha256 != known.sha256 or stored not in (None, known.sha256):
            logger.critical("ALARM settlement of %s differs from what was booked", known.period)
            raise MarketFault(
                f"the settlement of {known.period} differs from what was booked "
                f"({settlement.sha256[:12]}, {stored and stored[:12]} in {path}, booked "
                f"{known.sha256[:12]}): something was changed; run: market ledger verify"
            )
        if stored is None and not dry_run:
            await self._writer.on_files(write_lines, path, settlement)
        return settlement

    def _bounds(
        self, connection: Connection, period: str, month: tuple[datetime, datetime], dry_run: bool
    ) -> tuple[int, int]:
        """(after, until]: rows since the last settlement that were booked before ``end``."""
        start, end = month
        table = tables.settlements
        last = connection.execute(select(table).order_by(table.c.period.desc())).first()
        if last is not None and last.period > period:
            raise InvalidRequest(
                f"{last.period} is settled already; what is late falls into the next settlement"
            )
        if not dry_run and self._clock.now() < end:
            raise InvalidRequest(
                f"{period} is not over before {end:%Y-%m-%d} UTC; --dry-run shows what it is so far"
            )
        after = 0 if last is None else last.lsn_until
        skipped = manifest.last_row_before(connection, Dataset.USAGE, start)
        if skipped > after and not dry_run:
            raise InvalidRequest(
                f"rows {after + 1} to {skipped} are of months before {period}, which are not "
                "settled yet: settle those first"
            )
        until = manifest.last_row_before(connection, Dataset.USAGE, end)
        return after, max(after, until)

    async def _lines(self, after: int, until: int) -> list[Line]:
        """Sums of the rows in (after, until], by manifest; again if compaction moves a file."""
        for attempt in range(TRIES):
            parts = await self._writer.submit(
                lambda c: manifest.published(c, Dataset.USAGE, after, until)
            )
            paths = list(dict.fromkeys(self._sealer.publisher.path(part) for part in parts))
            try:
                lines = await asyncio.to_thread(sum_lines, paths, after, until)
            except (FileNotFoundError, duckdb.IOException) as error:
                if not gone(error) or attempt == TRIES - 1:
                    raise
                continue
            _require_all(lines, parts, after, until)
            return lines
        raise AssertionError("unreachable")

    def _book(self, connection: Connection, settlement: Settlement, made_by: str) -> None:
        moves = rules.transfers(settlement, made_by)
        if moves:
            self._store.transfer(connection, moves)
        connection.execute(
            tables.settlements.insert().values(
                period=settlement.period,
                settlement_id=settlement.settlement_id,
                lsn_after=settlement.lsn_after,
                lsn_until=settlement.lsn_until,
                fee_bps=settlement.fee_bps,
                resale_bps=settlement.resale_bps,
                sha256=settlement.sha256,
                rows=settlement.rows,
                charge_pico=settlement.charge_pico,
                fee_pico=settlement.fee_pico,
                settled_at=self._clock.now(),
            )
        )


def settlement_row(connection: Connection, period: str) -> Row[Any] | None:
    """The settlement of a period, None if it is open."""
    table = tables.settlements
    return connection.execute(select(table).where(table.c.period == period)).one_or_none()


def settlement_rows(connection: Connection) -> Sequence[Row[Any]]:
    """All settlements, oldest first."""
    return connection.execute(
        select(tables.settlements).order_by(tables.settlements.c.period)
    ).all()


def sum_lines(paths: Sequence[Path], after: int, until: int) -> list[Line]:
    """One line per tenant, provider, model, lane, kind and price; needs memory for those only."""
    if not paths:
        return []
    sources = {name: name for name in _TEXTS} | {"lent_by": f"attrs['{LENT_BY}']"}
    texts = ", ".join(f"coalesce({source}, '') AS {name}" for name, source in sources.items())
    sums = ", ".join(
        f"CAST(coalesce(sum({name}), 0) AS BIGINT) AS {name}" for name in _COUNTS if name != "rows"
    )
    query = (
        f"SELECT {texts}, count(*) AS rows, {sums}, sum(charge) AS charge "
        "FROM read_parquet($files, hive_partitioning = false) "
        "WHERE lsn > $after AND lsn <= $until GROUP BY ALL ORDER BY ALL"
    )
    settings: dict[str, str | int] = {"threads": THREADS, "memory_limit": MEMORY_LIMIT}
    with duckdb.connect(config=settings) as connection:
        parameters = {"files": [str(path) for path in paths], "after": after, "until": until}
        rows = connection.execute(query, parameters).fetchall()
    names = (*_TEXTS, *_COUNTS)
    return [
        Line(**dict(zip(names, row, strict=False)), charge_pico=to_pico(row[-1])) for row in rows
    ]


def _require_all(lines: Sequence[Line], parts: Sequence[Part], after: int, until: int) -> None:
    """Raises MarketFault unless the lines hold every row and every pico unit of the manifest."""
    found = (sum(line.rows for line in lines), sum(line.charge_pico for line in lines))
    sealed = (sum(part.rows for part in parts), sum(part.amount_pico for part in parts))
    if not found[0] == sealed[0] == until - after or found[1] != sealed[1]:
        raise MarketFault(
            f"rows {after + 1} to {until}: the files have {found}, the manifest {sealed}; "
            "run: market ledger verify"
        )


def write_lines(path: Path, settlement: Settlement) -> None:
    """Write the settlement's lines beside and rename them in; the same content again is kept.

    Raises MarketFault rather than overwrite something else.
    """
    stored = stored_digest(path)
    if stored == settlement.sha256:
        return
    if stored is not None:
        raise MarketFault(f"{path} holds another settlement; move it away and look into it")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}")
    with pq.ParquetWriter(fresh, LINES, compression="zstd") as writer:
        writer.write_table(lines_table(settlement))
        writer.add_key_value_metadata(
            {
                "settlement_id": settlement.settlement_id,
                "period": settlement.period,
                "lsn_after": str(settlement.lsn_after),
                "lsn_until": str(settlement.lsn_until),
                "fee_bps": str(settlement.fee_bps),
                "resale_bps": str(settlement.resale_bps),
            }
        )
    files.sync_file(fresh)
    files.move_new(fresh, path)
    files.sync_folders(path.parent, path.parent.parent)


def lines_table(settlement: Settlement) -> pa.Table:
    """The lines as they are stored."""
    rows = []
    for line in settlement.lines:
        money = {
            name: getattr(line, f"{name}_pico") for name in ("charge", "fee", "share", "payout")
        }
        rows.append(asdict(line) | {name: to_decimal(pico) for name, pico in money.items()})
    return pa.Table.from_pylist(rows, schema=LINES)


def stored_digest(path: Path) -> str | None:
    """Digest of the lines in a settlement's file, computed from them; None if there is no file."""
    if not path.exists():
        return None
    try:
        return read_lines(path).sha256
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
        return f"unreadable: {error}"


def read_lines(path: Path) -> Settlement:
    """A settlement from its file. Raises what pyarrow raises, or KeyError for another file."""
    with pq.ParquetFile(path) as file:
        said = {key.decode(): value.decode() for key, value in file.metadata.metadata.items()}
        rows = file.read().to_pylist()
    lines = []
    row: dict[str, Any]
    for row in rows:
        money: dict[str, Any] = {
            f"{name}_pico": to_pico(row.pop(name)) for name in ("charge", "fee", "share")
        }
        del row["payout"]
        lines.append(Line(**row, **money))
    bounds = (int(said["lsn_after"]), int(said["lsn_until"]))
    rates = (int(said["fee_bps"]), int(said["resale_bps"]))
    return Settlement(said["period"], *bounds, *rates, tuple(lines))


def _summary(settlement: Settlement, settled: bool, created: bool) -> dict[str, Any]:
    providers: dict[str, dict[str, int]] = {}
    for line in settlement.lines:
        names = ("charge", "fee", "share", "payout")
        sums = providers.setdefault(line.provider_id, dict.fromkeys(names, 0))
        for name in names:
            sums[name] += getattr(line, f"{name}_pico")
    return {
        "period": settlement.period,
        "settlement_id": settlement.settlement_id,
        "settled": settled,
        "created": created,
        "lsn_after": settlement.lsn_after,
        "lsn_until": settlement.lsn_until,
        "rows": settlement.rows,
        "fee_bps": settlement.fee_bps,
        "charge": format_money(settlement.charge_pico),
        "fee": format_money(settlement.fee_pico),
        "share": format_money(settlement.share_pico),
        "payout": format_money(sum(line.payout_pico for line in settlement.lines)),
        "sha256": settlement.sha256,
        "providers": [
            {"provider_id": name} | {key: format_money(pico) for key, pico in sums.items()}
            for name, sums in sorted(providers.items())
        ],
    }
