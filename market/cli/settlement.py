"""``market settle`` and ``market statement``: what is owed to whom at the end of a month."""

from enum import StrEnum
from typing import Annotated

import typer

from market.cli.output import Output, OutputOption, note, show

Period = Annotated[str, typer.Option(help="The month, e.g. 2026-11.")]


class Format(StrEnum):
    """Form of a statement."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    HTML = "html"


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command(epilog="Example: market settle --period 2026-11 --dry-run")(settle)
    app.command(epilog="Example: market statement acme --period 2026-11 --format html > a.html")(
        statement
    )


def settle(
    period: Period,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what it would be.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Close a month: verify the ledger, take the fee, write statements. Again changes nothing."""
    from market.cli.api import fetch

    body = {"period": period, "dry_run": dry_run}
    answer = fetch("POST", "/settlements", timeout_s=None, json=body).json()
    if output is Output.JSON:
        show(output, answer)
        return
    show(output, answer, [k for k in answer if k not in ("providers", "sha256", "settlement_id")])
    show(output, answer["providers"], empty="no usage in this period")
    if dry_run and not answer["settled"]:
        note("market: nothing was booked (--dry-run)")


def statement(
    name: Annotated[str, typer.Argument(help="Name of the tenant, or of the provider.")],
    period: Period,
    provider: Annotated[bool, typer.Option("--provider", help="NAME is a provider.")] = False,
    form: Annotated[Format, typer.Option("--format", help="Form of the answer.")] = Format.TABLE,
    output: OutputOption = Output.TABLE,
) -> None:
    """Print the statement of a month: balances, totals per model, lane and day, checkpoint."""
    from market.cli.api import fetch

    party = "provider" if provider else "tenant"
    wanted = "json" if form is Format.TABLE else str(form)
    answer = fetch(
        "GET",
        f"/statements/{party}/{name}",
        timeout_s=None,
        params={"period": period, "format": wanted},
    )
    if form is Format.TABLE and output is Output.TABLE:
        from market.cli.output import print_rich
        from market.ledger.exports import statement_from_json
        from market.ledger.statement_pages import as_table

        print_rich(as_table(statement_from_json(answer.json())))
    else:
        print(answer.text, end="" if answer.text.endswith("\n") else "\n")
