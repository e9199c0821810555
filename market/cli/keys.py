"""``market keys``: API keys."""

from typing import Annotated

import typer

from market.cli.output import Output, OutputOption, note, show

app = typer.Typer(help="API keys.", no_args_is_help=True)


@app.command(epilog="Example: market keys create --tenant acme")
def create(
    tenant: Annotated[str | None, typer.Option(help="The tenant it speaks for.")] = None,
    provider: Annotated[str | None, typer.Option(help="Or the provider.")] = None,
    save: Annotated[
        bool, typer.Option(help="Keep it on this machine (mode 0600) for market chat.")
    ] = True,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a key for a tenant or provider. The secret is shown now and never again."""
    from market.cli.api import request
    from market.config import Config
    from market.keys import write_secret

    subject = {"tenant_id": tenant, "provider_id": provider}
    answer = request("POST", "/keys", json={k: v for k, v in subject.items() if v is not None})
    config = Config.from_env()
    if save and tenant is not None:
        config.home.mkdir(parents=True, exist_ok=True)
        write_secret(config.chat_key_file, answer["api_key"])
        note(f"market: kept in {config.chat_key_file} for market chat; the market has only a hash")
    show(output, answer)


@app.command("ls", epilog="Example: market keys ls")
def list_keys(output: OutputOption = Output.TABLE) -> None:
    """List keys without their secrets."""
    from market.cli.api import request

    show(output, request("GET", "/keys"))


@app.command(epilog="Example: market keys revoke key-0123456789ab")
def revoke(
    api_key_id: Annotated[str, typer.Argument(help="Id from market keys ls.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """End a key; gateways refuse it within two seconds."""
    from market.cli.api import request

    show(output, request("DELETE", f"/keys/{api_key_id}"))
