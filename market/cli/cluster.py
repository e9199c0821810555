"""``market up``, ``down`` and ``status``."""

from datetime import UTC, datetime
from typing import Any

import typer

from market.cli import bars, deployments, leases
from market.cli.output import Output, OutputOption, note, show

REFUSED_SHOWN = 5


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command(epilog="Example: MARKET_HOME=/data/market market up")(up)
    app.command(epilog="Example: market down")(down)
    app.command(epilog="Example: market status --output json")(status)


def up(output: OutputOption = Output.TABLE) -> None:
    """Start the market on this machine (again is harmless)."""
    from market.cluster.node import enter_environment
    from market.config import Config
    from market.keys import hash_key, key_id, new_key, write_secret

    config = Config.from_env()
    enter_environment(config.state_dir)
    from market import bootstrap

    config.home.mkdir(parents=True, exist_ok=True)
    if not config.operator_key_file.exists():
        write_secret(config.operator_key_file, new_key())
    key = config.operator_key_file.read_text().strip()
    bootstrap.up(config, hash_key(key), key_id(key), lambda text: note(f"market: {text}"))
    answer = {
        "url": f"{config.url}/v1",
        "home": str(config.home),
        "operator_key_file": str(config.operator_key_file),
    }
    show(output, answer)


def down(output: OutputOption = Output.TABLE) -> None:
    """Stop the market on this machine: seal the ledger, then end every process."""
    from market.cluster.node import enter_environment
    from market.config import Config

    config = Config.from_env()
    enter_environment(config.state_dir)
    from market import bootstrap

    ran = bootstrap.down(config, lambda text: note(f"market: {text}"))
    show(output, {"state": "stopped" if ran else "was not running"})


def status(output: OutputOption = Output.TABLE) -> None:
    """Show nodes and their GPUs, deployments, leases, the queue and the ledger."""
    from market.cli.api import request

    answer = request("GET", "/status")
    if output is Output.JSON:
        show(output, answer)
        return
    here = [offer for offer in answer["offers"] if offer["state"] != "left"]
    for offer in here:
        print("\n".join(bars.node_lines(offer)))
    print(f"{bars.LEGEND}\n" if here else "no nodes; try: market join")
    show(
        output,
        [deployments.row(deployment) for deployment in answer["deployments"]],
        deployments.COLUMNS,
        empty="no deployments; try: market deploy tiny-qwen --mode tokens",
    )
    now = datetime.now(UTC)
    show(
        output,
        [
            leases.row(lease) | {"ends_in": bars.remaining(lease["end"], now)}
            for lease in answer["leases"]
        ],
        ("lease", "tenant", "model", "place", "state", "ends_in", "charged", "credited", "reason"),
        empty="no leases; try: market deploy tiny-qwen --mode lease --gpus 0.5 --term 1h",
    )
    leases.show_orders(output, _queue(answer["orders"]))
    _show_ledger(answer)


def _queue(orders: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Orders that wait, and the last ones that were refused."""
    refused = [order for order in orders if order["state"] == "refused"]
    return [order for order in orders if order["state"] == "waiting"] + refused[:REFUSED_SHOWN]


def _show_ledger(answer: dict[str, Any]) -> None:
    ledger = answer["ledger"]
    print(f"ledger   {ledger['next_lsn'] - 1:,} records, {ledger['open_holds']} open holds")
    print(f"tenants  {answer['tenants']}")
    if not ledger["has_room"]:
        print("ALARM    the ledger's disk is full: no new request is admitted")
    for alarm in ledger["alarms"]:
        print(f"ALARM    {alarm['name']} of {alarm['about']}: {alarm['detail']}")
