"""``market usage``: what was used and charged."""

from typing import Annotated

import typer

from market.cli.output import Output, OutputOption, show


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command(epilog="Example: market usage --by model,day --tenant acme --since 7d")(usage)


def usage(
    by: Annotated[
        str,
        typer.Option(
            help="Groups: model, tenant, key, lane, provider, day, hour, reason, kind, "
            "deployment, lease."
        ),
    ] = "model",
    tenant: Annotated[str | None, typer.Option(help="Only this tenant.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    since: Annotated[
        str | None, typer.Option(help="From then on: 7d, 24h, 30m, 2026-11-01 or an ISO time.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Before then, written alike.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Sum requests, tokens and charges over the usage ledger."""
    from market.cli.api import request

    asked = {"by": by, "tenant": tenant, "model": model, "since": since, "until": until}
    parameters = {name: value for name, value in asked.items() if value is not None}
    show(output, request("GET", "/usage", params=parameters), empty="no usage yet")
