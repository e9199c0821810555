"""``market models``: the catalog."""

import typer

from market.cli.output import Output, OutputOption, show

app = typer.Typer(help="The catalog of models.", no_args_is_help=True)


@app.command("ls", epilog="Example: market models ls")
def list_models(output: OutputOption = Output.TABLE) -> None:
    """List models with what they need and what they cost per million tokens."""
    from market.cli.api import request

    rows = request("GET", "/models")
    if output is Output.TABLE:
        for row in rows:
            row["parameters"] = _billions(row["parameters"])
            row["weights_gib"] = f"{row['weights_bytes'] / 2**30:.2f}"
            row["memory_gib"] = f"{row['memory_mib'] / 1024:.1f}"
    columns = (
        *("model", "source", "licence", "parameters", "weights_gib", "memory_gib"),
        *("context_tokens", "input_price", "cached_input_price", "output_price", "state"),
    )
    show(output, rows, columns)


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
