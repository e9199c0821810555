"""Questions to the usage ledger, answered by DuckDB over an exact snapshot."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
from sqlalchemy import Row

from market.accounts import tenant_account
from market.errors import InvalidRequest
from market.forecast import BUCKET_S
from market.ledger.manifest import KEYS, SCHEMAS, Dataset, entries_table
from market.ledger.snapshot import Snapshot
from market.pricing import to_pico
from market.types import SHARED

GROUPS = {
    "model": "model",
    "tenant": "tenant_id",
    "key": "api_key_id",
    "lane": "lane",
    "provider": "provider_id",
    "day": "CAST(booked_at AT TIME ZONE 'UTC' AS DATE)",
    "hour": "date_trunc('hour', booked_at AT TIME ZONE 'UTC')",
    "reason": "finish_reason",
    "kind": "kind",
    "deployment": "deployment_id",
    "lease": "lease_id",
}
# On whose lease a request of the pool was served is not its tenant's business.
_OWN_LEASE = f"CASE WHEN lane NOT IN {tuple(map(str, SHARED))} THEN lease_id END"
BUCKETS = {"1m": 60, "1h": 3600, "1d": 86_400}
BUCKET_GROUPS = {"model": "model", "api_key_id": "api_key_id", "project_id": "tenant_id"}
BUCKETS_MAX = 1440

_SUMS = (
    "count(*) FILTER (kind = 'tokens') AS requests, "
    "CAST(coalesce(sum(input_tokens), 0) AS BIGINT) AS input_tokens, "
    "CAST(coalesce(sum(cached_input_tokens), 0) AS BIGINT) AS cached_input_tokens, "
    "CAST(coalesce(sum(output_tokens), 0) AS BIGINT) AS output_tokens, "
    "CAST(coalesce(sum(gpu_us), 0) AS BIGINT) AS gpu_us, "
    "coalesce(sum(charge), 0) AS charge, currency "
)
# What auto routing saved: what the dearer of two ways would have cost, beyond the one taken.
_SAVED = (
    "coalesce(sum(greatest(CAST(attrs['not_taken_charge'] AS DECIMAL(38, 12)) - abs(charge), 0) "
    "* CASE kind WHEN 'tokens' THEN 1 WHEN 'reversal' THEN -1 ELSE 0 END), 0) AS saved, "
)
_WHERE = (
    "WHERE ($tenant IS NULL OR tenant_id = $tenant) AND ($model IS NULL OR model = $model) "
    "AND ($since IS NULL OR booked_at >= $since) AND ($until IS NULL OR booked_at < $until) "
)


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Which rows to sum, [since, until) by booking time, and by what.

    ``lenders``: the leases on which a pool's requests were served are told apart.
    """

    by: tuple[str, ...] = ("model",)
    tenant: str | None = None
    model: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    lenders: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.by if name not in GROUPS]
        if unknown:
            raise InvalidRequest(
                f"cannot group usage by {unknown[0]!r}; choose from {', '.join(GROUPS)}", param="by"
            )

    def parameters(self) -> dict[str, Any]:
        """Values of the conditions."""
        return {
            "tenant": self.tenant,
            "model": self.model,
            "since": self.since,
            "until": self.until,
        }


def usage(snapshot: Snapshot, query: UsageQuery) -> list[dict[str, Any]]:
    """Requests, tokens, GPU time, charge and savings per group, largest charge first."""
    columns = GROUPS if query.lenders else GROUPS | {"lease": _OWN_LEASE}
    groups = "".join(f'{columns[name]} AS "{name}", ' for name in query.by)
    sql = f"SELECT {groups} {_SAVED} {_SUMS} FROM usage {_WHERE} GROUP BY ALL"
    rows = _rows(snapshot, sql, query.parameters())
    return sorted(rows, key=lambda row: (-row["charge"], [str(row[name]) for name in query.by]))


def buckets(
    snapshot: Snapshot, query: UsageQuery, width: str, groups: Sequence[str]
) -> list[dict[str, Any]]:
    """Sums per bucket of ``width`` (1m, 1h, 1d) and group; ``start_time`` in Unix seconds."""
    if width not in BUCKETS:
        raise InvalidRequest(f"bucket_width {width!r}: choose from {', '.join(BUCKETS)}")
    unknown = [name for name in groups if name not in BUCKET_GROUPS]
    if unknown:
        raise InvalidRequest(
            f"cannot group_by {unknown[0]!r}; choose from {', '.join(BUCKET_GROUPS)}"
        )
    step = BUCKETS[width]
    columns = "".join(f'{BUCKET_GROUPS[name]} AS "{name}", ' for name in groups)
    start = f"CAST(epoch_us(booked_at) // 1000000 // {step} * {step} AS BIGINT) AS start_time"
    sql = f"SELECT {start}, {columns} {_SUMS} FROM usage {_WHERE} GROUP BY ALL ORDER BY ALL"
    return _rows(snapshot, sql, query.parameters())


def arrivals(snapshot: Snapshot, since: datetime) -> list[tuple[str, int, int, float]]:
    """Requests of pools by model and ten minutes: (model, bucket, requests, seconds under way)."""
    sql = (
        f"SELECT model, CAST(epoch_us(started_at) // {BUCKET_S * 10**6} AS BIGINT) AS bucket, "
        "count(*) AS requests, coalesce(sum(duration_ms), 0) / 1000.0 AS busy_s FROM usage "
        "WHERE kind = 'tokens' AND lane IN ('tokens', 'spill') AND started_at >= $since "
        "GROUP BY ALL ORDER BY ALL"
    )
    rows = _rows(snapshot, sql, {"since": since})
    return [(row["model"], row["bucket"], row["requests"], float(row["busy_s"])) for row in rows]


def spent_before(snapshot: Snapshot, subject: str, since: datetime, until_lsn: int) -> int:
    """What an API key or a tenant (by its account id) was charged since then, in pico units.

    Rows from ``until_lsn`` on and corrections are left out.
    """
    column = "tenant_id" if subject.startswith(tenant_account("")) else "api_key_id"
    sql = (
        f"SELECT coalesce(sum(charge), 0) AS charge FROM usage WHERE {column} = $name "
        "AND booked_at >= $since AND lsn < $until AND kind IN ('tokens', 'gpu')"
    )
    name = subject.removeprefix(tenant_account(""))
    rows = _rows(snapshot, sql, {"name": name, "since": since, "until": until_lsn})
    return to_pico(rows[0]["charge"])


def rows_of_request(snapshot: Snapshot, request_id: str) -> list[dict[str, Any]]:
    """A request's rows, first its own and then what was taken back of it."""
    sql = "SELECT * FROM usage WHERE request_id = $request_id ORDER BY lsn"
    return _rows(snapshot, sql, {"request_id": request_id})


def live_stream(dataset: Dataset, entries: Sequence[Row[Any]], after: int) -> bytes:
    """Rows of journal entries beyond ``after`` as an Arrow IPC stream."""
    table = entries_table(dataset, entries) if entries else SCHEMAS[dataset].empty_table()
    keys = table.column(KEYS[dataset]).to_pylist()
    fresh = table.slice(sum(key <= after for key in keys))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMAS[dataset]) as stream:
        stream.write_table(fresh)
    return bytes(sink.getvalue().to_pybytes())


def _rows(snapshot: Snapshot, sql: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    with snapshot.connect() as connection:
        # Through Arrow: DuckDB's own rows need another library for times with a zone.
        rows: list[dict[str, Any]] = (
            connection.sql(sql, params=parameters).to_arrow_table().to_pylist()
        )
        return rows
