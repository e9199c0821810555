"""``market up``, ``down`` and ``status``."""

import typer

from market.cli.output import Output, OutputOption, note, show


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
    """Show offers, deployments and the ledger."""
    from market.cli.api import request

    answer = request("GET", "/status")
    if output is Output.JSON:
        show(output, answer)
        return
    for offer in answer["offers"]:
        offer["gpus"] = len(offer["gpus"]) or "none"
        offer["ask"] = f"{offer['ask']} {offer['currency']}/GPU-hour"
    show(
        output,
        answer["offers"],
        (
            "offer_id",
            "provider_id",
            "node_id",
            "gpu_type",
            "gpus",
            "cpu_count",
            "memory_mib",
            "ask",
        ),
    )
    show(
        output,
        answer["deployments"],
        ("model", "mode", "engine", "replicas", "state", "reason"),
        empty="no deployments; try: market deploy tiny-qwen --mode tokens",
    )
    ledger = answer["ledger"]
    print(f"ledger   {ledger['next_lsn'] - 1:,} records, {ledger['open_holds']} open holds")
    print(f"tenants  {answer['tenants']}")
    if not ledger["has_room"]:
        print("ALARM    the ledger's disk is full: no new request is admitted")
    for alarm in ledger["alarms"]:
        print(f"ALARM    {alarm['name']} of {alarm['about']}: {alarm['detail']}")
