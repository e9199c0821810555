"""``market ledger``: the Parquet files."""

from typing import Annotated

import typer

from market.cli.output import Output, OutputOption, show

app = typer.Typer(help="The Parquet ledgers.", no_args_is_help=True)


@app.command(epilog="Example: market ledger path transfers")
def path(
    dataset: Annotated[str, typer.Argument(help="usage or transfers.")] = "usage",
    output: OutputOption = Output.TABLE,
) -> None:
    """Print the folder of a ledger on this machine, ready for pandas or DuckDB."""
    from market.config import Config
    from market.errors import InvalidRequest, NotFound

    if dataset not in ("usage", "transfers"):
        raise InvalidRequest(f"there is no ledger {dataset!r}; choose usage or transfers")
    folder = Config.from_env().ledger_dir / dataset
    if not folder.is_dir():
        raise NotFound(f"no ledger at {folder}; is MARKET_HOME right? (market up makes it)")
    if output is Output.JSON:
        show(output, {"path": str(folder)})
    else:
        print(folder)
