"""The ledger for other programs and for people: FOCUS files, statements in three forms."""

import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.compute as pc

from market.errors import InvalidRequest
from market.ledger import statement_pages
from market.ledger.focus import FocusContext, focus_table, write_focus
from market.ledger.snapshot import Snapshot
from market.ledger.statement import Statement


def statement_text(statement: Statement, form: str) -> str:
    """A statement as ``json``, ``csv`` or ``html``. Raises InvalidRequest for another form."""
    match form:
        case "json":
            return json.dumps(statement_pages.as_json(statement), indent=2)
        case "csv":
            return statement_pages.as_csv(statement)
        case "html":
            return statement_pages.as_html(statement)
    raise InvalidRequest(f"format {form!r} is not known; choose from json, csv, html")


def statement_from_json(value: dict[str, Any]) -> Statement:
    """The statement that ``statement_text(..., "json")`` wrote."""
    for line in value["lines"]:
        line.setdefault("fee", None)  # tenants' lines have none
    return msgspec.convert(value, Statement, strict=False)


def focus_file(
    snapshot: Snapshot, context: FocusContext, version: str, form: str, tenant: str | None
) -> bytes:
    """A month in the FOCUS format, of one tenant or all, as a ``parquet`` or ``csv`` file."""
    with snapshot.connect() as connection:
        table = focus_table(connection, context, version)
    if tenant is not None:
        table = table.filter(pc.equal(table["BillingAccountId"], tenant))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"focus.{form}"
        write_focus(table, path)
        return path.read_bytes()
