"""``market prices``: dated prices of models."""

from typing import Annotated

import typer

from market.cli.output import Output, OutputOption, show

app = typer.Typer(help="Prices per million tokens.", no_args_is_help=True)


@app.command("show", epilog="Example: market prices show")
def show_prices(output: OutputOption = Output.TABLE) -> None:
    """Show the prices in force."""
    from market.cli.api import request

    show(output, request("GET", "/prices"), empty="no prices")


@app.command("set", epilog="Example: market prices set qwen-7b --input 0.15 --output-price 0.60")
def set_price(
    model: Annotated[str, typer.Argument(help="Model of the catalog.")],
    input_price: Annotated[str, typer.Option("--input", help="Per million input tokens.")],
    output_price: Annotated[str, typer.Option("--output-price", help="Per million output tokens.")],
    cached: Annotated[
        str | None, typer.Option(help="Per million cached input tokens; default: as input.")
    ] = None,
    valid_from: Annotated[
        str | None, typer.Option(help="In force from then on (ISO time); default: now.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Set a price. Requests that run keep theirs; those admitted later have the new one."""
    from market.cli.api import request

    asked = {
        "model": model,
        "input_price": input_price,
        "output_price": output_price,
        "cached_input_price": cached,
        "valid_from": valid_from,
    }
    body = {name: value for name, value in asked.items() if value is not None}
    show(output, request("POST", "/prices", json=body))
