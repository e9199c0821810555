"""``market ledger``: the Parquet files and the proof of them."""

import sys
from pathlib import Path
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


@app.command(epilog="Example: market ledger verify")
def verify(output: OutputOption = Output.TABLE) -> None:
    """Recompute everything; name the first bad file, row and reason, and exit with 1."""
    from market.cli.api import fetch

    report = fetch("POST", "/ledger/verify", timeout_s=None).json()
    finding = report["finding"]
    if output is Output.JSON:
        show(output, report)
    elif finding is None:
        show(output, {"ledger": "verified", **report}, [k for k in report if k != "finding"])
    if finding is not None:
        row = "" if finding["row"] is None else f", row {finding['row']}"
        print(
            f"market: NOT VERIFIED: {finding['where']}{row}: {finding['reason']}", file=sys.stderr
        )
        raise typer.Exit(1)


@app.command(epilog="Example: market ledger prove req-gw0-1000000001 > proof.json")
def prove(
    request_id: Annotated[str, typer.Argument(help="The answer's x-request-id.")],
    size: Annotated[
        int | None, typer.Option(help="Prove it against the checkpoint of this size.")
    ] = None,
    output: OutputOption = Output.JSON,
) -> None:
    """Print a proof that a request's row is in the log, for scripts/verify_proof.py (JSON)."""
    from market.cli.api import request

    parameters = {} if size is None else {"size": size}
    proof = request("GET", f"/ledger/proofs/{request_id}", params=parameters)
    if output is Output.JSON:
        show(output, proof)
    else:
        show(output, [{"column": name, "value": value} for name, _, value in proof["row"]])


@app.command(epilog="Example: market ledger checkpoint > checkpoint.txt")
def checkpoint(output: OutputOption = Output.TABLE) -> None:
    """Print a signed checkpoint: whoever keeps it can prove that nothing was rewritten."""
    from market.cli.api import request

    answer = request("GET", "/ledger/checkpoint")
    if output is Output.JSON:
        show(output, answer)
    else:
        print(answer["checkpoint"], end="")


@app.command(epilog="Example: market ledger compact")
def compact(output: OutputOption = Output.TABLE) -> None:
    """Make each closed day one file now (the market does so by itself)."""
    from market.cli.api import fetch

    made = fetch("POST", "/ledger/compact", timeout_s=None).json()["files"]
    if output is Output.JSON:
        show(output, {"files": made})
    else:
        show(output, [{"file": name} for name in made], empty="nothing to compact")


@app.command(epilog="Example: market ledger export --focus 1.2 --period 2026-11 november.csv")
def export(
    file: Annotated[Path, typer.Argument(help="File to write, .parquet or .csv.")],
    period: Annotated[str, typer.Option(help="The month, e.g. 2026-11.")],
    focus: Annotated[str, typer.Option(help="FOCUS version: 1.2 or 1.3.")] = "1.2",
    tenant: Annotated[str | None, typer.Option(help="Only this tenant.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Write a month's usage in the FinOps FOCUS format."""
    from market.cli.api import fetch
    from market.errors import InvalidRequest

    form = file.suffix.removeprefix(".")
    if form not in ("parquet", "csv"):
        raise InvalidRequest(f"{file}: the name must end in .parquet or .csv")
    if not file.parent.is_dir():
        raise InvalidRequest(f"{file}: there is no folder {file.parent}")
    asked = {"period": period, "version": focus, "format": form, "tenant": tenant}
    parameters = {name: value for name, value in asked.items() if value is not None}
    content = fetch("GET", "/ledger/focus", timeout_s=None, params=parameters).content
    file.write_bytes(content)
    show(output, {"file": str(file), "focus": focus, "bytes": len(content)})
