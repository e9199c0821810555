"""Tables for people, JSON for programs; every command takes ``--output``. Questions, too."""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
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


def confirm(question: str, yes: bool) -> None:
    """Ask on the terminal before something that cannot be undone; ``yes`` was said already.

    Raises InvalidRequest where there is nobody to ask, typer.Exit after a no.
    """
    from market.errors import InvalidRequest

    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidRequest(f"{question} There is no terminal to ask on: say so with --yes")
    if not typer.confirm(question, default=False, err=True):
        note("market: nothing was changed")
        raise typer.Exit(1)


def check_time(text: str | None) -> str | None:
    """An option that is a moment to come, as typer's callback. Raises typer.BadParameter.

    Durations are refused: elsewhere 7d means seven days ago, and a machine that joins again must
    say the same time again.
    """
    if text is not None:
        try:
            datetime.fromisoformat(text)
        except ValueError:
            raise typer.BadParameter(
                f"{text!r} is no time; use 2026-11-01 or 2026-11-01T12:00:00Z (UTC)"
            ) from None
    return text


def parse_budgets(options: Sequence[str] | None) -> dict[str, str | None] | None:
    """``5/day`` or ``none/day`` as amounts by period, not read yet. Raises InvalidRequest."""
    from market.errors import InvalidRequest
    from market.types import Period

    if not options:
        return None
    found: dict[str, str | None] = {}
    for option in options:
        amount, slash, period = option.partition("/")
        if not slash or period not in set(Period):
            raise InvalidRequest(f"--budget {option!r}: say it as 5/{'|'.join(Period)}")
        found[period] = None if amount == "none" else amount
    return found


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
