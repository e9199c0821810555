"""``market keys``: API keys, what they may do and spend."""

from typing import Annotated, Any

import typer

from market.cli.output import Output, OutputOption, note, parse_budgets, show

app = typer.Typer(help="API keys: scopes, limits, budgets, rotation.", no_args_is_help=True)

KeyId = Annotated[str, typer.Argument(help="Id from market keys ls.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", help="Only these models; several times.")
]
Lanes = Annotated[
    list[str] | None, typer.Option("--lane", help="Only this lane: tokens (pools) or lease.")
]
ReadOnly = Annotated[
    bool | None,
    typer.Option("--read-only/--read-write", help="It reads, but buys and changes nothing."),
]
Expires = Annotated[
    str | None, typer.Option(help="From when it is refused: 30d from now, or a time (UTC).")
]
PerMinute = Annotated[int | None, typer.Option("--rpm", help="Requests per minute.")]
TokensPerMinute = Annotated[
    int | None, typer.Option("--tpm", help="Tokens per minute, input and output.")
]
Concurrent = Annotated[int | None, typer.Option(help="Requests at a time.")]
BudgetOption = Annotated[
    list[str] | None,
    typer.Option("--budget", help="What it may spend: 5/day, 0.20/hour, 100/month, 300/total."),
]


@app.command(epilog="Example: market keys create --tenant acme --model qwen-7b --budget 5/day")
def create(  # noqa: PLR0913  # one argument per option
    tenant: Annotated[str | None, typer.Option(help="The tenant it speaks for.")] = None,
    provider: Annotated[str | None, typer.Option(help="Or the provider.")] = None,
    operator: Annotated[bool, typer.Option("--operator", help="Or the operator.")] = False,
    model: Models = None,
    lane: Lanes = None,
    read_only: ReadOnly = None,
    expires: Expires = None,
    requests_per_min: PerMinute = None,
    tokens_per_min: TokensPerMinute = None,
    concurrent: Concurrent = None,
    budget: BudgetOption = None,
    save: Annotated[
        bool, typer.Option(help="Keep it on this machine (mode 0600) for market chat.")
    ] = True,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a key for a tenant, a provider or the operator. The secret is shown now and never again.

    Limits hold for all gateways together.
    """
    from market.cli.api import request
    from market.config import Config
    from market.keys import write_secret

    asked: dict[str, Any] = {
        "tenant_id": tenant,
        "provider_id": provider,
        "operator": operator or None,
    }
    asked |= _policy(model, lane, read_only, expires, requests_per_min, tokens_per_min, concurrent)
    asked["budgets"] = parse_budgets(budget)
    body = {name: value for name, value in asked.items() if value is not None}
    answer = request("POST", "/keys", json=body)
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

    keys = request("GET", "/keys")
    if output is Output.TABLE:
        keys = [_row(key) for key in keys]
    show(output, keys, empty="no keys; try: market keys create --tenant acme")


@app.command("set", epilog="Example: market keys set key-0123456789ab --rpm 60 --budget 5/day")
def change(  # noqa: PLR0913  # one argument per option
    api_key_id: KeyId,
    model: Models = None,
    lane: Lanes = None,
    read_only: ReadOnly = None,
    expires: Expires = None,
    requests_per_min: PerMinute = None,
    tokens_per_min: TokensPerMinute = None,
    concurrent: Concurrent = None,
    budget: BudgetOption = None,
    unlimited: Annotated[
        list[str] | None,
        typer.Option(
            help="Lift a limit: model, lane, expires, rpm, tpm or concurrent; several times."
            " A budget is lifted by --budget none/day."
        ),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Change what a key may do; what is left out stays."""
    from market.cli.api import request
    from market.errors import InvalidRequest

    asked = _policy(model, lane, read_only, expires, requests_per_min, tokens_per_min, concurrent)
    asked["budgets"] = parse_budgets(budget)
    body = {name: value for name, value in asked.items() if value is not None}
    for name in unlimited or ():
        if name not in LIFTED:
            raise InvalidRequest(f"--unlimited {name!r}: one of {', '.join(LIFTED)}")
        body[LIFTED[name]] = None
    if not body:
        raise InvalidRequest("nothing to change; see: market keys set --help")
    answer = request("PATCH", f"/keys/{api_key_id}", json=body)
    show(output, _row(answer) if output is Output.TABLE else answer)


@app.command(epilog="Example: market keys rotate key-0123456789ab --overlap 24h")
def rotate(
    api_key_id: KeyId,
    overlap: Annotated[
        str, typer.Option(help="For how long the old secret works on; 0 ends it now.")
    ] = "24h",
    output: OutputOption = Output.TABLE,
) -> None:
    """Give a key a new secret. It is shown now and never again."""
    from market.cli.api import request

    show(output, request("POST", f"/keys/{api_key_id}/rotate", json={"overlap": overlap}))


@app.command(epilog="Example: market keys revoke key-0123456789ab")
def revoke(api_key_id: KeyId, output: OutputOption = Output.TABLE) -> None:
    """End a key; gateways refuse it within five seconds."""
    from market.cli.api import request

    show(output, request("DELETE", f"/keys/{api_key_id}"))


LIFTED = {
    "model": "models",
    "lane": "lanes",
    "expires": "expires",
    "rpm": "requests_per_min",
    "tpm": "tokens_per_min",
    "concurrent": "concurrent",
}


def _policy(
    model: list[str] | None,
    lane: list[str] | None,
    read_only: bool | None,
    expires: str | None,
    requests_per_min: int | None,
    tokens_per_min: int | None,
    concurrent: int | None,
) -> dict[str, Any]:
    return {
        "models": model or None,
        "lanes": lane or None,
        "read_only": read_only,
        "expires": expires,
        "requests_per_min": requests_per_min,
        "tokens_per_min": tokens_per_min,
        "concurrent": concurrent,
    }


def _row(key: dict[str, Any]) -> dict[str, Any]:
    """A key in a table: its limits in few words."""
    policy = key["policy"]
    limits = [
        *(f"model {name}" for name in policy["models"] or ()),
        *(f"lane {name}" for name in policy["lanes"] or ()),
        *(["read-only"] if policy["read_only"] else ()),
        *(
            f"{policy[name]:,} {unit}"
            for name, unit in (
                ("requests_per_min", "requests/min"),
                ("tokens_per_min", "tokens/min"),
                ("concurrent", "at a time"),
            )
            if policy[name] is not None
        ),
        *(f"{budget['limit']} per {budget['period']}" for budget in key["budgets"]),
    ]
    return {
        "api_key_id": key["api_key_id"],
        "role": key["role"],
        "subject": key["subject_id"],
        "limits": ", ".join(limits) or "none",
        "expires": policy["expires_at"],
        "revoked": key["revoked_at"],
    }
