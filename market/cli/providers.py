"""``market providers``: who sells GPUs."""

from typing import Annotated

import typer

from market.cli.output import Output, OutputOption, note, show

app = typer.Typer(help="Providers, who sell GPUs.", no_args_is_help=True)


@app.command(epilog="Example: market providers create gpu-farm")
def create(
    provider: Annotated[str, typer.Argument(help="Name of the provider.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a provider with empty accounts (again is harmless)."""
    from market.cli.api import request

    show(output, request("POST", "/providers", json={"provider_id": provider}))


@app.command("ls", epilog="Example: market providers ls")
def list_providers(output: OutputOption = Output.TABLE) -> None:
    """List providers."""
    from market.cli.api import request

    show(output, request("GET", "/providers"), empty="no providers")


@app.command(epilog="Example: market providers token gpu-farm")
def token(
    provider: Annotated[str, typer.Argument(help="Name of the provider.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a token with which one machine of the provider can join within the hour."""
    from market.cli.api import request
    from market.config import Config

    answer = request("POST", f"/providers/{provider}/join-tokens")
    note(
        f"market: on the provider's machine: market join {Config.from_env().url} "
        f"--provider {provider} --ask PRICE --token TOKEN"
    )
    show(output, answer)
