"""``market tenants``: who buys, and their balances."""

import uuid
from typing import Annotated

import typer

from market.cli.output import Output, OutputOption, show

app = typer.Typer(help="Tenants and their balances.", no_args_is_help=True)

Tenant = Annotated[str, typer.Argument(help="Name of the tenant.")]


@app.command(epilog="Example: market tenants create acme")
def create(tenant: Tenant, output: OutputOption = Output.TABLE) -> None:
    """Make a tenant with an empty account (again is harmless)."""
    from market.cli.api import request

    show(output, request("POST", "/tenants", json={"tenant_id": tenant}))


@app.command("ls", epilog="Example: market tenants ls --output json")
def list_tenants(output: OutputOption = Output.TABLE) -> None:
    """List tenants."""
    from market.cli.api import request

    show(output, request("GET", "/tenants"), empty="no tenants; try: market tenants create acme")


@app.command("show", epilog="Example: market tenants show acme")
def show_tenant(tenant: Tenant, output: OutputOption = Output.TABLE) -> None:
    """Show a tenant's balance."""
    from market.cli.api import request

    show(output, request("GET", f"/tenants/{tenant}"))


@app.command(epilog="Example: market tenants deposit acme 10 --id invoice-17")
def deposit(
    tenant: Tenant,
    amount: Annotated[
        str, typer.Argument(help="Amount in the market's currency, e.g. 10 or 2.50.")
    ],
    deposit_id: Annotated[
        str | None, typer.Option("--id", help="The same id again books nothing.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Kept in the transfers ledger.")] = "deposit",
    output: OutputOption = Output.TABLE,
) -> None:
    """Book money that a tenant paid in."""
    from market.cli.api import request

    body = {"amount": amount, "deposit_id": deposit_id or uuid.uuid4().hex, "reason": reason}
    show(output, request("POST", f"/tenants/{tenant}/deposits", json=body))


@app.command(epilog="Example: market tenants refund acme --request req-gw0-1 --reason 'bad answer'")
def refund(
    tenant: Tenant,
    reason: Annotated[str, typer.Option(help="Why; it goes into the ledger with who did it.")],
    request_id: Annotated[
        str | None, typer.Option("--request", help="Take this request back, or --amount of it.")
    ] = None,
    amount: Annotated[str | None, typer.Option(help="Amount to give back.")] = None,
    provider: Annotated[
        str | None,
        typer.Option(help="Who pays an amount without a request; default: the market."),
    ] = None,
    refund_id: Annotated[
        str | None, typer.Option("--id", help="The same id again books nothing.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Give money back: a new row in the ledger, no row is ever changed."""
    from market.cli.api import request

    asked = {
        "reason": reason,
        "request_id": request_id,
        "amount": amount,
        "provider_id": provider,
        "refund_id": refund_id or uuid.uuid4().hex,
    }
    body = {name: value for name, value in asked.items() if value is not None}
    show(output, request("POST", f"/tenants/{tenant}/refunds", json=body))
