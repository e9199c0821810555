"""Tables for people, JSON for programs; every command takes ``--output``."""

import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer


class Output(StrEnum):
    """Form of a command's answer."""

    TABLE = "table"
    JSON = "json"


OutputOption = Annotated[
    Output, typer.Option("--output", "-o", help="Form of the answer.", show_default=True)
]


def show(
    output: Output, value: Any, columns: Sequence[str] = (), empty: str = "nothing to show"
) -> None:
    """Print a row or rows: as JSON whole, as a table only the named columns."""
    if output is Output.JSON:
        print(json.dumps(value, indent=2))
        return
    rows = [value] if isinstance(value, Mapping) else list(value)
    if not rows:
        print(empty)
        return
    _table(rows, columns or list(rows[0]))


def note(text: str) -> None:
    """Progress and hints go to standard error, so that output can be piped."""
    print(text, file=sys.stderr, flush=True)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    numeric = {name for name in columns if all(_is_number(row.get(name)) for row in rows)}
    for name in columns:
        justify = "right" if name in numeric else "left"
        table.add_column(name.replace("_", " "), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    print_rich(table)


def print_rich(shown: Any) -> None:
    """Print something that rich can render."""
    from rich.console import Console

    console = Console()
    # Piped output has no width; cutting a value to 80 columns would lose data.
    console.width = console.width if sys.stdout.isatty() else 250
    console.print(shown)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _is_number(value: Any) -> bool:
    text = str(value).lstrip("-")
    return text.replace(".", "", 1).isdigit()
