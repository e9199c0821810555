"""Sums over the usage ledger: published files plus the rows that are in none of them yet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from market.errors import InvalidRequest

GROUPS = {
    "model": "model",
    "tenant": "tenant_id",
    "key": "api_key_id",
    "lane": "lane",
    "provider": "provider_id",
    "day": "CAST(booked_at AT TIME ZONE 'UTC' AS DATE)",
    "reason": "finish_reason",
}
_COLUMNS = (
    "booked_at, tenant_id, api_key_id, model, lane, provider_id, finish_reason, "
    "input_tokens, cached_input_tokens, output_tokens, charge, currency"
)


def usage(
    files: Sequence[Path], live: pa.Table, by: Sequence[str], tenant_id: str | None
) -> list[dict[str, Any]]:
    """Requests, tokens and charge per group, largest charge first.

    Raises InvalidRequest for a group that does not exist.
    """
    unknown = [name for name in by if name not in GROUPS]
    if unknown:
        raise InvalidRequest(
            f"cannot group usage by {unknown[0]!r}; choose from {', '.join(GROUPS)}", param="by"
        )
    groups = "".join(f'{GROUPS[name]} AS "{name}", ' for name in by)
    sources = [f"SELECT {_COLUMNS} FROM live"]
    if files:
        sources.append(f"SELECT {_COLUMNS} FROM read_parquet($files)")
    query = (
        f"SELECT {groups} count(*) AS requests, "
        "CAST(coalesce(sum(input_tokens), 0) AS BIGINT) AS input_tokens, "
        "CAST(coalesce(sum(cached_input_tokens), 0) AS BIGINT) AS cached_input_tokens, "
        "CAST(coalesce(sum(output_tokens), 0) AS BIGINT) AS output_tokens, "
        "coalesce(sum(charge), 0) AS charge, currency "
        f"FROM ({' UNION ALL '.join(sources)}) "
        "WHERE $tenant IS NULL OR tenant_id = $tenant "
        "GROUP BY ALL ORDER BY charge DESC, requests DESC"
    )
    parameters: dict[str, Any] = {"tenant": tenant_id}
    if files:
        parameters["files"] = [str(file) for file in files]
    with duckdb.connect(config={"threads": 2}) as connection:
        connection.register("live", live)
        cursor = connection.execute(query, parameters)
        names = [column[0] for column in cursor.description or []]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
