"""``market usage``: what was used and charged."""

from typing import Annotated

import typer

from market.cli.output import Output, OutputOption, show


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command(epilog="Example: market usage --by model,day --tenant acme")(usage)


def usage(
    by: Annotated[
        str, typer.Option(help="Groups: model, tenant, key, lane, provider, day, reason.")
    ] = "model",
    tenant: Annotated[str | None, typer.Option(help="Only this tenant.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Sum requests, tokens and charges over the usage ledger."""
    from market.cli.api import request

    parameters = {"by": by} | ({"tenant": tenant} if tenant else {})
    show(output, request("GET", "/usage", params=parameters), empty="no usage yet")
