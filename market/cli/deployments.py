"""``market deploy``, ``quote``, ``undeploy`` and ``deployments``."""

import re
import time
import uuid
from typing import Annotated, Any

import typer

from market.cli import bars, leases
from market.cli.output import Output, OutputOption, check_time, confirm, note, show

COLUMNS = (
    *("deployment", "model", "mode", "tenant", "engine", "replicas", "place", "state", "reason"),
)
QUOTE = (
    *("model", "place", "gpu_type", "start", "end", "price_per_gpu_hour", "price_per_hour"),
    *("total", "held", "currency"),
)
OPTION_OF = {"provider_id": "provider", "tenant_id": "tenant", "ttft_s": "ttft"}
POLL_S = 0.3
# It serves, or will at the first request.
SETTLED = ("ready", "cold")


def _check_replicas(text: str | None) -> str | None:
    """Raises typer.BadParameter unless it is a number or MIN:MAX."""
    if text is not None and re.fullmatch(r"\d+(:\d+)?", text) is None:
        raise typer.BadParameter("a number, or MIN:MAX like 0:4")
    return text


Model = Annotated[str, typer.Argument(help="A model of the catalog (market models ls).")]
Engine = Annotated[str | None, typer.Option(help="vllm or transformers.")]
Gpus = Annotated[
    str | None, typer.Option(help="Lease: whole GPUs, or a share of one: 0.5; default: 1.")
]
Term = Annotated[str | None, typer.Option(help="Lease: how long, e.g. 30d, 12h, 90m; default: 1h.")]
Start = Annotated[
    str | None,
    typer.Option(
        callback=check_time,
        help="Lease: from then on, e.g. 2026-11-01T12:00Z; default: now.",
    ),
]
GpuType = Annotated[str | None, typer.Option(help="Lease: only this type (market offers).")]
GpuMemory = Annotated[
    int | None, typer.Option("--gpu-memory-gib", min=1, help="Lease: GPUs with this much at least.")
]
MaxPrice = Annotated[str | None, typer.Option(help="Lease: at most this per GPU-hour.")]
Region = Annotated[str | None, typer.Option(help="Lease: only in this region.")]
Provider = Annotated[str | None, typer.Option(help="Lease: only from this provider.")]
Resale = Annotated[
    bool,
    typer.Option("--resale", help="Lease: sell its idle time by the token; you get a part of it."),
]
Tenant = Annotated[
    str | None, typer.Option(help="Lease: for whom; a tenant's own key says it already.")
]
Mode = Annotated[
    str,
    typer.Option(
        help="tokens: sold to everybody. lease: GPUs of its own for a tenant. hybrid: a lease "
        "that spills to the pool. auto: each request where it is cheapest."
    ),
]
Replicas = Annotated[
    str | None,
    typer.Option(
        callback=_check_replicas,
        help="Tokens: how many replicas, or MIN:MAX by demand (0: none when idle); default: 1.",
    ),
]
KeepAlive = Annotated[
    str | None,
    typer.Option(help="Tokens: idle replicas above MIN stay so long; default: by break-even."),
]
MaxSpend = Annotated[
    str | None, typer.Option(help="Tokens: at most this an hour for the pool's GPUs.")
]
SpillBudget = Annotated[
    str | None, typer.Option(help="Hybrid: spills cost at most this a day; default: any.")
]
Ttft = Annotated[
    float | None,
    typer.Option(help="Hybrid, auto: first token wanted within so many seconds; default: 2."),
]
Cheap = Annotated[
    str | None, typer.Option(help="Auto: this model for easy requests; MODEL is a new name.")
]
Strong = Annotated[str | None, typer.Option(help="Auto: this model for hard ones.")]
CostTarget = Annotated[
    float | None,
    typer.Option(help="Auto: so much of what the strong model alone costs; default: 0.5."),
]
OrderId = Annotated[str | None, typer.Option(help="Lease: the same id again orders nothing more.")]
Queue = Annotated[bool, typer.Option("--queue", help="Lease: wait until GPUs are free.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only say where it would go, and a lease's price.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command(
        epilog="Examples: market deploy tiny-qwen --mode tokens --engine vllm; "
        "market deploy tiny-qwen --replicas 0:2 --keep-alive 10m; "
        "market deploy qwen-7b --mode lease --gpus 0.5 --term 30d --tenant acme; "
        "market deploy qwen-7b --mode hybrid --term 30d --spill-budget 5 --tenant acme; "
        "market deploy smart --mode auto --cheap qwen-0.5b --strong qwen-7b --tenant acme"
    )(deploy)
    app.command(epilog="Example: market quote qwen-7b --gpus 2 --term 30d --tenant acme")(quote)
    app.command(epilog="Examples: market undeploy tiny-qwen; market undeploy LEASE --yes")(undeploy)
    app.command(epilog="Example: market deployments --output json")(deployments)


def deploy(  # noqa: PLR0913  # one argument per option
    model: Model,
    mode: Mode = "tokens",
    engine: Engine = None,
    replicas: Replicas = None,
    keep_alive: KeepAlive = None,
    max_spend: MaxSpend = None,
    gpus: Gpus = None,
    term: Term = None,
    start: Start = None,
    gpu_type: GpuType = None,
    gpu_memory_gib: GpuMemory = None,
    max_price: MaxPrice = None,
    region: Region = None,
    provider: Provider = None,
    resale: Resale = False,
    spill_budget: SpillBudget = None,
    ttft: Ttft = None,
    cheap: Cheap = None,
    strong: Strong = None,
    cost_target: CostTarget = None,
    tenant: Tenant = None,
    order_id: OrderId = None,
    queue: Queue = False,
    dry_run: DryRun = False,
    wait: Annotated[bool, typer.Option(help="Wait until it serves.")] = True,
    timeout_s: Annotated[float, typer.Option(help="Longest wait.")] = 600,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a model available: its tokens to everybody, or GPUs of its own to a tenant, or both."""
    from market.cli.api import request

    wanted = _given(
        engine=engine,
        replicas=replicas,
        keep_alive=keep_alive,
        max_spend=max_spend,
        gpus=gpus,
        term=term,
        start=start,
        gpu_type=gpu_type,
        gpu_memory_gib=gpu_memory_gib,
        max_price=max_price,
        region=region,
        provider_id=provider,
        resale=resale,
        spill_budget=spill_budget,
        ttft_s=ttft,
        cheap=cheap,
        strong=strong,
        cost_target=cost_target,
        tenant_id=tenant,
        order_id=order_id,
        queue=queue,
    )
    _check_options(mode, wanted)
    leased = mode in ("lease", "hybrid")
    if leased:
        wanted.setdefault("order_id", f"order-{uuid.uuid4().hex[:16]}")
    body = _given(model=model, mode=mode, dry_run=dry_run) | wanted
    answer = request("POST", "/deployments", json=body)
    if dry_run and leased:
        _show_quote(output, answer)
        return
    if leased:
        answer = _granted(answer, wait, timeout_s)
    elif wait and not dry_run:
        answer = _wait(answer, timeout_s, time.monotonic())
    _show(output, answer)


def quote(  # noqa: PLR0913  # one argument per option
    model: Model,
    engine: Engine = None,
    gpus: Gpus = None,
    term: Term = None,
    start: Start = None,
    gpu_type: GpuType = None,
    gpu_memory_gib: GpuMemory = None,
    max_price: MaxPrice = None,
    region: Region = None,
    provider: Provider = None,
    resale: Resale = False,
    tenant: Tenant = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what a lease would get and cost right now; exit code 1 and the reason if nothing fits.

    The first hour is what would be held.
    """
    from market.cli.api import request

    order = _given(
        model=model,
        engine=engine,
        gpus=gpus,
        term=term,
        start=start,
        gpu_type=gpu_type,
        gpu_memory_gib=gpu_memory_gib,
        max_price=max_price,
        region=region,
        provider_id=provider,
        resale=resale,
        tenant_id=tenant,
    )
    _show_quote(output, request("POST", "/quotes", json=order))


def undeploy(
    name: Annotated[str, typer.Argument(help="A deployed model, or a deployment's id.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before a lease ends.")] = False,
    timeout_s: Annotated[float, typer.Option(help="Longest wait.")] = 120,
    output: OutputOption = Output.TABLE,
) -> None:
    """Drain a deployment and stop serving it; asks before it ends a lease."""
    from market.cli.api import request
    from market.errors import MarketFault

    known = request("GET", "/deployments")
    found = _named(name, known)
    deployment_id = found["deployment_id"]
    if found["lease_id"] is not None and found["state"] != "stopping":
        confirm(leases.question(request("GET", f"/leases/{found['lease_id']}")), yes)
    _end(found, known)
    deadline_s = time.monotonic() + timeout_s
    while _find(deployment_id) is not None:
        if time.monotonic() > deadline_s:
            raise MarketFault(f"{name} still drains after {timeout_s:.0f} s")
        time.sleep(POLL_S)
    show(output, {"deployment_id": deployment_id, "model": found["model"], "state": "removed"})


def deployments(output: OutputOption = Output.TABLE) -> None:
    """List what is deployed, and where."""
    from market.cli.api import request

    rows = request("GET", "/deployments")
    if output is Output.TABLE:
        rows = [row(deployment) for deployment in rows]
    show(output, rows, COLUMNS, empty="no deployments")


def row(deployment: dict[str, Any]) -> dict[str, Any]:
    """A deployment as a line of a table."""
    serves = deployment["state"] == "ready"
    return deployment | {
        "reason": (serves and deployment.get("scaling")) or deployment["reason"],
        "deployment": deployment["deployment_id"],
        "tenant": deployment["tenant_id"],
        "replicas": _replicas(deployment),
        "place": bars.places(deployment),
    }


def _replicas(deployment: dict[str, Any]) -> str:
    """How many serve of how many there may be: "1/1", "2 of 0:4"."""
    least, most = (deployment["replicas"][name] for name in ("minimum", "maximum"))
    ready = deployment["ready"]
    return f"{ready}/{most}" if least == most else f"{ready} of {least}:{most}"


def _given(**options: Any) -> dict[str, Any]:
    """What was said; the rest is the market's to decide."""
    return {n: value for n, value in options.items() if value is not None and value is not False}


def _check_options(mode: str, given: dict[str, Any]) -> None:
    """Raises typer.BadParameter for an option that the mode has no use for."""
    from market.types import MODE_FIELDS

    uses = {str(known): fields for known, fields in MODE_FIELDS.items()}
    if mode not in uses:
        raise typer.BadParameter(f"{mode}: use {', '.join(uses)}", param_hint="--mode")
    for name in (name for name in given if name not in uses[mode]):
        modes = " and ".join(known for known, fields in uses.items() if name in fields)
        option = OPTION_OF.get(name, name.replace("_", "-"))
        raise typer.BadParameter(f"is for --mode {modes} only", param_hint=f"--{option}")


def _show(output: Output, answer: dict[str, Any]) -> None:
    if output is Output.JSON:
        show(output, answer)
    elif "places" in answer:
        show(output, row(answer), COLUMNS)
    else:
        leases.show_orders(output, answer["order"])


def _show_quote(output: Output, answer: dict[str, Any]) -> None:
    """Raises NoCapacity with the reason if nothing fits."""
    from market.errors import NoCapacity

    if output is Output.JSON:
        show(output, answer)
    if not answer["fits"]:
        raise NoCapacity(answer["reason"])
    if output is Output.TABLE:
        times = {name: bars.moment(answer[name]) for name in ("start", "end")}
        show(output, answer | times | {"place": bars.place(answer)}, QUOTE)


def _granted(answer: dict[str, Any], wait: bool, timeout_s: float) -> dict[str, Any]:
    """A lease's deployment once it serves; as it is if it is booked for later or not waited for.

    Raises MarketError if the lease or its replica ended, or the time is over.
    """
    from market.errors import Conflict

    began_s = time.monotonic()
    order, lease = answer["order"], answer["lease"]
    if lease is None:
        note(f"market: order {order['order_id']} waits: {order['reason']}")
        if not wait:
            return answer
        lease = leases.wait_for_match(order, timeout_s, began_s)
    if lease["state"] == "closed":
        raise Conflict(
            f"order {order['order_id']} was lease {lease['lease_id']}, which is closed "
            f"({lease['reason']}); choose another --order-id"
        )
    note(f"market: {leases.words(lease)}")
    deployment = _find(lease["lease_id"])
    if wait and deployment is not None and not leases.is_later(order, lease):
        deployment = _wait(deployment, timeout_s, began_s)
    return answer | (deployment or {}) | {"lease": lease}


def _wait(deployment: dict[str, Any], timeout_s: float, began_s: float) -> dict[str, Any]:
    """Poll until it serves. Raises MarketFault if it fails or takes too long."""
    from market.errors import MarketFault

    told = ""
    current: dict[str, Any] | None = deployment
    while current is not None and current["state"] not in SETTLED:
        if current["state"] == "failed":
            raise MarketFault(f"{current['model']} did not start: {current['reason']}")
        if current["state"] == "stopping" and current["lease_id"] is not None:
            break
        if time.monotonic() - began_s > timeout_s:
            raise MarketFault(f"{current['model']} not ready after {timeout_s:.0f} s: {told}")
        if current["reason"] not in ("", told):
            told = current["reason"]
            note(f"market: {current['model']}: {told.splitlines()[0]}")
        time.sleep(POLL_S)
        current = _find(deployment["deployment_id"])
    if current is None or current["state"] not in SETTLED:
        why = leases.why_closed(deployment["lease_id"]) if deployment["lease_id"] else ""
        raise MarketFault(f"{deployment['model']} was removed while it started{why}")
    return current


def _named(name: str, known: list[dict[str, Any]]) -> dict[str, Any]:
    """The deployment meant by a model or an id; a model's pool goes before its leases.

    Raises NotFound, Conflict if several leases are meant.
    """
    from market.errors import Conflict, NotFound

    found = [d for d in known if name in (d["deployment_id"], d["model"])]
    exact = [d for d in found if d["deployment_id"] == name]
    pools = [d for d in found if d["lease_id"] is None]
    chosen = exact or pools or found
    if not chosen:
        raise NotFound(f"{name!r} is not deployed (market deployments)")
    if len(chosen) > 1:
        names = ", ".join(d["deployment_id"] for d in chosen)
        raise Conflict(f"{name} is deployed several times; say which: {names}")
    return chosen[0]


def _end(deployment: dict[str, Any], known: list[dict[str, Any]]) -> None:
    """Remove a deployment. Raises the market's refusal, with the leases that may be meant.

    By its id: the model's name could mean a lease by now, and nobody was asked about that.
    """
    from market.cli.api import request
    from market.errors import MarketError

    try:
        request("DELETE", f"/deployments/{deployment['deployment_id']}")
    except MarketError as error:
        same = [d for d in known if d["model"] == deployment["model"] and d["lease_id"] is not None]
        if not same or deployment["lease_id"] is not None:
            raise
        names = ", ".join(d["deployment_id"] for d in same)
        raise type(error)(f"{error.message}; its leases are ended by their ids: {names}") from None


def _find(deployment_id: str) -> dict[str, Any] | None:
    from market.cli.api import request

    found = [d for d in request("GET", "/deployments") if d["deployment_id"] == deployment_id]
    return found[0] if found else None
