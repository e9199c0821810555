"""``market tenants``: who buys, and their balances."""

import uuid
from typing import Annotated, Any

import typer

from market.cli.output import Output, OutputOption, parse_budgets, print_rich, show

app = typer.Typer(help="Tenants: balances, budgets, token packs.", no_args_is_help=True)

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
    """Show a tenant's balance, budgets and token packs."""
    from market.cli.api import request

    _show_tenant(output, request("GET", f"/tenants/{tenant}"))


@app.command("set", epilog="Example: market tenants set acme --weight 4 --budget 2/hour")
def change(
    tenant: Tenant,
    weight: Annotated[
        int | None, typer.Option(help="Its share of a contended pool, against the others' (1).")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget", help="What it may spend: 2/hour, 5/day, 100/month, 300/total, none/day."
        ),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Set a tenant's weight in contended pools and its budgets; what is left out stays."""
    from market.cli.api import request
    from market.errors import InvalidRequest

    asked = {"weight": weight, "budgets": parse_budgets(budget)}
    body = {name: value for name, value in asked.items() if value is not None}
    if not body:
        raise InvalidRequest("nothing to change; say --weight or --budget")
    _show_tenant(output, request("PATCH", f"/tenants/{tenant}", json=body))


@app.command("buy-tokens", epilog="Example: market tenants buy-tokens acme qwen-7b 50000000")
def buy_tokens(
    tenant: Tenant,
    model: Annotated[str, typer.Argument(help="Model from market models.")],
    tokens: Annotated[int, typer.Argument(help="Output tokens; input counts by its price.")],
    valid_for: Annotated[
        str, typer.Option("--valid", help="For how long; what is left then is lost.")
    ] = "30d",
    discount: Annotated[
        int, typer.Option(help="Percent off today's price; an operator's to give.")
    ] = 0,
    pack_id: Annotated[
        str | None, typer.Option("--id", help="The same id again buys nothing.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Buy tokens of one model ahead, from the balance. They are used before the balance is."""
    from market.cli.api import request

    asked = {
        "model": model,
        "tokens": tokens,
        "valid_for": valid_for,
        "discount_percent": discount,
        "pack_id": pack_id,
    }
    body = {name: value for name, value in asked.items() if value is not None}
    show(output, request("POST", f"/tenants/{tenant}/packs", json=body))


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


def _show_tenant(output: Output, tenant: dict[str, Any]) -> None:
    if output is Output.JSON:
        show(output, tenant)
        return
    lists = ("budgets", "packs")
    show(output, {name: value for name, value in tenant.items() if name not in lists})
    for name in lists:
        if tenant[name]:
            print_rich(name)
            show(output, tenant[name])
