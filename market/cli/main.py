"""Root of the ``market`` command; it only composes. Heavy imports happen inside commands."""

import sys

import typer

from market.cli import (
    chat,
    cluster,
    deployments,
    keys,
    leases,
    ledger,
    models,
    nodes,
    prices,
    providers,
    settlement,
    tenants,
    usage,
)

app = typer.Typer(
    name="market",
    help="Sell and use GPUs: leases and metered tokens behind one OpenAI-compatible endpoint.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="First steps: market up; market deploy tiny-qwen --mode tokens; market status",
)

for module in (cluster, nodes, deployments, usage, settlement, chat):
    module.register(app)
app.add_typer(leases.app, name="leases")
app.add_typer(models.app, name="models")
app.add_typer(tenants.app, name="tenants")
app.add_typer(keys.app, name="keys")
app.add_typer(providers.app, name="providers")
app.add_typer(prices.app, name="prices")
app.add_typer(ledger.app, name="ledger")


def main() -> None:
    """Run the command: 0 good, 1 a known error in one line, 2 wrong usage."""
    from market.errors import MarketError

    try:
        app()
    except MarketError as error:
        print(f"market: {error.message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
