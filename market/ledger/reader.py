"""``market.ledger.read``: the ledgers as Arrow, pandas or a DuckDB relation.

Reads the public files and, if a market answers, adds the rows that are in none of them yet. Rows
are contiguous and there once, whatever is published or compacted meanwhile.
"""

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from market.config import Config
from market.errors import InvalidRequest, MarketFault, NotFound, Overloaded
from market.ledger.manifest import KEYS, SCHEMAS, Dataset

TRIES = 8
TIMEOUT_S = 30.0
_RANGE = re.compile(r"(?:part|compact)-(\d{12,})-(\d{12,})\.parquet")

Form = Literal["arrow", "pandas", "duckdb"]


def read(
    dataset: str = "usage",
    *,
    tenant: str | None = None,
    model: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    live: bool = True,
    form: Form = "arrow",
    config: Config | None = None,
) -> Any:
    """Rows of ``usage`` or ``transfers``, in order of their numbers.

    ``since`` and ``until`` bound the booking time, [since, until). ``tenant`` filters usage by
    tenant and transfers by the tenant's account; ``model`` is for usage. ``live=False`` reads
    the files alone and needs no running market; otherwise MARKET_API_KEY, or the operator's key
    file, must be there. Returns a pyarrow.Table, a pandas.DataFrame with Arrow types or a DuckDB
    relation. Raises InvalidRequest, NotFound (no ledger here), Overloaded or MarketFault.
    """
    config = config or Config.from_env()
    kind = _dataset(dataset, model)
    wanted = _filter(kind, tenant, model, (since, until))
    for _ in range(TRIES):
        table, last = _read_files(config.ledger_dir / kind, kind, wanted)
        if not live:
            return _as(form, table)
        fresh = _read_live(config, kind, last)
        if fresh.num_rows and fresh[KEYS[kind]][0].as_py() != last + 1:
            continue  # the files were listed long ago: what came after is no longer live
        if wanted is not None:
            fresh = ds.dataset(fresh).to_table(filter=wanted)
        return _as(form, pa.concat_tables([table, fresh]))
    raise MarketFault("the ledger changes faster than it can be read")


def _dataset(name: str, model: str | None) -> Dataset:
    if name not in list(Dataset):
        raise InvalidRequest(f"there is no ledger {name!r}; choose from {', '.join(Dataset)}")
    if name != Dataset.USAGE and model is not None:
        raise InvalidRequest("model: transfers have no model")
    return Dataset(name)


def _filter(
    kind: Dataset,
    tenant: str | None,
    model: str | None,
    between: tuple[datetime | None, datetime | None],
) -> pc.Expression | None:
    conditions = []
    if tenant is not None and kind is Dataset.USAGE:
        conditions.append(pc.field("tenant_id") == tenant)
    elif tenant is not None:
        account = f"tenant:{tenant}"
        conditions.append(
            (pc.field("debit_account") == account) | (pc.field("credit_account") == account)
        )
    if model is not None:
        conditions.append(pc.field("model") == model)
    since, until = (moment and _utc(moment) for moment in between)
    if since is not None:
        conditions.append(pc.field("booked_at") >= since)
    if until is not None:
        conditions.append(pc.field("booked_at") < until)
    whole = None
    for condition in conditions:
        whole = condition if whole is None else whole & condition
    return whole


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _read_files(folder: Path, kind: Dataset, wanted: pc.Expression | None) -> tuple[pa.Table, int]:
    """(rows, number of the last one that the files have)."""
    if not folder.is_dir():
        raise NotFound(f"no ledger at {folder}; is MARKET_HOME right? (market up makes it)")
    for _ in range(TRIES):
        paths, last = _contiguous(folder)
        if paths is None:
            continue
        try:
            files = ds.dataset(paths, schema=SCHEMAS[kind], format="parquet")
            return files.to_table(filter=wanted), last
        except FileNotFoundError:
            continue  # a day was compacted in between
    raise MarketFault(f"{folder} has a gap, or changes faster than it can be read")


def _contiguous(folder: Path) -> tuple[list[str] | None, int]:
    """The files that hold rows 1 to ``last``; None if a listing missed one, as listings may."""
    ranges = {}
    for path in folder.glob("date=*/*.parquet"):
        found = _RANGE.fullmatch(path.name)
        if found:
            ranges[int(found[1])] = (int(found[2]), path)
    last, paths = 0, []
    for lo in sorted(ranges):
        hi, path = ranges[lo]
        if lo != last + 1:
            return None, 0
        last = hi
        paths.append(str(path))
    return paths, last


def _read_live(config: Config, kind: Dataset, after: int) -> pa.Table:
    import httpx

    key = os.environ.get("MARKET_API_KEY") or _key_file(config)
    try:
        answer = httpx.get(
            f"{config.url}/market/v1/ledger/live",
            params={"dataset": str(kind), "after": after},
            headers={"authorization": f"Bearer {key}"},
            timeout=TIMEOUT_S,
        )
    except httpx.TransportError as error:
        raise Overloaded(
            f"no market answers at {config.url}; live=False reads what is published"
        ) from error
    if answer.status_code != 200:
        raise MarketFault(f"the market answers {answer.status_code}: {answer.text[:200]}")
    return pa.ipc.open_stream(answer.content).read_all()


def _key_file(config: Config) -> str:
    try:
        return config.operator_key_file.read_text().strip()
    except FileNotFoundError:
        raise InvalidRequest(
            "no key: set MARKET_API_KEY, or use live=False to read what is published"
        ) from None


def _as(form: Form, table: pa.Table) -> Any:
    match form:
        case "arrow":
            return table
        case "pandas":
            import pandas

            return table.to_pandas(types_mapper=pandas.ArrowDtype)
        case "duckdb":
            import duckdb

            return duckdb.from_arrow(table)
    raise InvalidRequest(f"form {form!r}: choose arrow, pandas or duckdb")
