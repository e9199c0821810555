"""``market models``: the catalog, and models on the nodes' disks."""

import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from market.cli.output import Output, OutputOption, show

app = typer.Typer(help="The catalog of models, and their files.", no_args_is_help=True)

CATALOG = (
    *("model", "source", "licence", "parameters", "weights_gib", "memory_gib"),
    *("context_tokens", "input_price", "cached_input_price", "output_price", "state"),
)
STORED = ("node", "model", "state", "gib", "in_memory", "used", "pinned", "in_use", "message")
POLL_S = 0.3
AGAIN_MAX = 20
# So long nothing may change, but for files that are checked.
QUIET_S = 120.0
ENDED = ("ready", "by_hand", "failed")

Name = Annotated[str, typer.Argument(help="A model of the catalog (market models ls).")]
Nodes = Annotated[
    list[str] | None, typer.Option("--node", help="Only this node (again for more); default: all.")
]


@app.command("ls", epilog="Examples: market models ls; market models ls --stored")
def list_models(
    stored: Annotated[
        bool, typer.Option("--stored", help="What is on the disks of the nodes.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """List models with what they need and what they cost per million tokens."""
    from market.cli.api import request

    if stored:
        rows = request("GET", "/stored-models")
        if output is Output.TABLE:
            rows = [_stored_row(row) for row in rows]
        show(output, rows, STORED, empty="no models on disk")
        return
    rows = request("GET", "/models")
    if output is Output.TABLE:
        rows = [_catalog_row(row) for row in rows]
    show(output, rows, CATALOG)


@app.command(
    "add",
    epilog="Example: market models add ours --source s3://bucket/ours --input-price 0.10 "
    "--output-price 0.40",
)
def add(  # noqa: PLR0913  # one argument per option
    name: Annotated[str, typer.Argument(help="What it will be called.")],
    source: Annotated[
        str,
        typer.Option(
            help="OWNER/NAME[@REVISION] of the Hugging Face hub, modelscope://OWNER/NAME, "
            "https://HOST/FOLDER, s3://BUCKET/FOLDER, or an absolute path."
        ),
    ],
    input_price: Annotated[str, typer.Option(help="Per million input tokens.")],
    output_price: Annotated[str, typer.Option(help="Per million output tokens.")],
    cached_input_price: Annotated[
        str | None, typer.Option(help="Per million cached input tokens; default: as input.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="As it is to be shown.")] = None,
    tool_parser: Annotated[
        str | None, typer.Option(help="vLLM's, by name: how it calls tools; default: hermes.")
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(help="vLLM's, by name: how it shows its reasoning; default: none.")
    ] = None,
    parameters: Annotated[
        int | None, typer.Option(help="How many; only for quantized ones.", min=1)
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Add a model to the catalog. What it needs is read from its files; none are pulled yet."""
    from market.cli.api import request

    asked = {
        "name": name,
        "source": source,
        "input_price": input_price,
        "output_price": output_price,
        "cached_input_price": cached_input_price,
        "licence": licence,
        "tool_parser": tool_parser,
        "reasoning_parser": reasoning_parser,
        "parameters": parameters,
    }
    body = {field: value for field, value in asked.items() if value is not None}
    row = request("POST", "/models", json=body)
    show(output, _catalog_row(row) if output is Output.TABLE else row)


@app.command("forget", epilog="Example: market models forget ours")
def forget(model: Name, output: OutputOption = Output.TABLE) -> None:
    """Take a model that was added out of the catalog; files on nodes stay (market models rm)."""
    from market.cli.api import request

    show(output, request("DELETE", f"/models/{model}"))


@app.command("pull", epilog="Example: market models pull qwen-7b --node gpu-1 --pin")
def pull(
    model: Name,
    node: Nodes = None,
    pin: Annotated[
        bool | None, typer.Option(help="Never evict it, or allow it again; default: as it is.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until it is there.")] = True,
    output: OutputOption = Output.TABLE,
) -> None:
    """Have a model's files on nodes before it starts there; again goes on where it broke off."""
    from market.errors import MarketFault

    nodes = _begin(model, node or [], pin)
    rows = _watch(model, nodes, pin) if wait else _rows(model, nodes)
    failed = [row for row in rows if row["message"]]
    if failed:
        first = failed[0]
        raise MarketFault(f"{model} was not pulled to {first['node_id']}: {first['message']}")
    show(output, rows if output is Output.JSON else list(map(_stored_row, rows)), STORED)


@app.command("rm", epilog="Example: market models rm qwen-7b --node gpu-1")
def remove(model: Name, node: Nodes = None, output: OutputOption = Output.TABLE) -> None:
    """Remove a model's files from nodes; one that is in use stays."""
    from market.cli.api import request

    answer = request("DELETE", f"/stored-models/{model}", params={"node": node or []})
    if output is Output.TABLE:
        freed = sum(answer["freed_bytes"].values())
        nodes = ", ".join(answer["freed_bytes"])
        answer = {"model": model, "nodes": nodes, "freed_gib": f"{freed / 2**30:.2f}"}
    show(output, answer)


def _begin(model: str, nodes: list[str], pin: bool | None) -> list[str]:
    """Ask for a pull; the nodes that do."""
    from market.cli.api import request

    asked = {"model": model, "nodes": nodes, "pin": pin}
    begun: list[str] = request("POST", "/stored-models", json=asked)["nodes"]
    return begun


def _watch(model: str, nodes: list[str], pin: bool | None) -> list[dict[str, Any]]:
    """The rows of all nodes once nothing is pulled any more, with a bar for each meanwhile.

    A pull whose process died is asked for again: it goes on where it broke off. Raises MarketFault
    if a node tells nothing new for long.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from market.errors import MarketFault

    again, told, told_s = 0, None, time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bars = {name: progress.add_task(f"{model} on {name}", total=None) for name in nodes}
        while True:
            rows = _rows(model, nodes)
            for row in rows:
                progress.update(
                    bars[row["node_id"]],
                    completed=row["bytes"],
                    total=row["total_bytes"] or None,
                )
            if len(rows) == len(nodes) and all(row["state"] in ENDED for row in rows):
                break
            news = [(row["node_id"], row["state"], row["bytes"]) for row in rows]
            checked = any(
                row["state"] == "pulling" and 0 < row["total_bytes"] <= row["bytes"] for row in rows
            )
            if news != told or checked:
                told, told_s = news, time.monotonic()
            elif time.monotonic() - told_s > QUIET_S:
                ended = {row["node_id"] for row in rows if row["state"] in ENDED}
                quiet = ", ".join(name for name in nodes if name not in ended)
                raise MarketFault(
                    f"nothing new of the pull of {model} for {QUIET_S:.0f} s from {quiet}; what "
                    "runs there goes on: see market models ls --stored, or pull again"
                )
            broken = [row["node_id"] for row in rows if row["state"] == "partial"]
            if broken:
                again += 1
                if again > AGAIN_MAX:
                    raise MarketFault(f"the pull of {model} breaks off again and again")
                _begin(model, broken, pin)
            time.sleep(POLL_S)
    return rows


def _rows(model: str, nodes: list[str]) -> list[dict[str, Any]]:
    from market.cli.api import request

    rows = request("GET", "/stored-models", params={"model": model})
    return [row for row in rows if row["node_id"] in nodes]


def _catalog_row(row: dict[str, Any]) -> dict[str, Any]:
    return row | {
        "parameters": _billions(row["parameters"]),
        "weights_gib": f"{row['weights_bytes'] / 2**30:.2f}",
        "memory_gib": f"{row['memory_mib'] / 1024:.1f}",
    }


def _stored_row(row: dict[str, Any]) -> dict[str, Any]:
    used = datetime.fromtimestamp(row["used_s"], UTC)
    size = f"{row['bytes'] / 2**30:.2f}"
    if row["bytes"] < row["total_bytes"]:
        size += f" of {row['total_bytes'] / 2**30:.2f}"
    return row | {
        "node": row["node_id"],
        "gib": size,
        "in_memory": f"{row['cached']:.0%}",
        "used": f"{used:%Y-%m-%d %H:%M}" if row["used_s"] else "",
    }


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
