"""``market leases``: GPUs that are leased, and orders that wait for some."""

import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from market.cli import bars
from market.cli.output import Output, OutputOption, confirm, note, show

COLUMNS = (
    *("lease", "tenant", "model", "place", "state", "start", "end", "price", "charged"),
    *("credited", "reason"),
)
ORDER = ("order_id", "tenant_id", "model", "gpus", "term", "state", "reason")
POLL_S = 1.0

app = typer.Typer(help="Leased GPUs, and orders that wait for some.", no_args_is_help=True)

Lease = Annotated[str, typer.Argument(help="Id from market leases ls.")]


@app.command("ls", epilog="Example: market leases ls --all")
def list_leases(
    closed: Annotated[bool, typer.Option("--all", help="Those that are over, too.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """List leases: a tenant's own, those on a provider's nodes, or all."""
    from market.cli.api import request

    rows = request("GET", "/leases", params={"closed": closed})
    if output is Output.TABLE:
        rows = [row(lease) for lease in rows]
    empty = "no leases; try: market deploy tiny-qwen --mode lease --gpus 0.5 --term 1h"
    show(output, rows, COLUMNS, empty=empty)


@app.command("show", epilog="Example: market leases show lease-261101120000-1")
def show_lease(lease: Lease, output: OutputOption = Output.TABLE) -> None:
    """Show everything about a lease."""
    from market.cli.api import request

    answer = request("GET", f"/leases/{lease}")
    if output is Output.TABLE:
        answer = [{"field": name.replace("_", " "), "value": v} for name, v in answer.items()]
    show(output, answer)


@app.command(epilog="Example: market leases renew lease-261101120000-1 --term 7d")
def renew(
    lease: Lease,
    term: Annotated[str, typer.Option(help="How much longer, e.g. 7d, 12h, 90m.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Let a lease last longer, at its price."""
    from market.cli.api import request

    _show(output, request("POST", f"/leases/{lease}/renew", json={"term": term}))


@app.command("set", epilog="Example: market leases set lease-261101120000-1 --spill-budget 10")
def change(
    lease: Lease,
    spill_budget: Annotated[
        str | None, typer.Option(help="Hybrid: most that spills cost a day; none for any.")
    ] = None,
    ttft: Annotated[
        float | None, typer.Option(help="Hybrid: spill if the first token would take longer (s).")
    ] = None,
    resale: Annotated[
        bool | None, typer.Option(help="Sell its idle time by the token, or do no longer.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Change how a hybrid spills, and whether idle time is sold; what is left out stays."""
    from market.cli.api import request
    from market.errors import InvalidRequest

    asked = {"spill_budget": spill_budget, "ttft_s": ttft, "resale": resale}
    body: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if spill_budget == "none":
        body["spill_budget"] = None
    if not body:
        raise InvalidRequest("nothing to change; see: market leases set --help")
    changed = request("PATCH", f"/leases/{lease}", json=body)
    if changed["policy"] is not None:
        budget = changed["policy"]["spill_budget"]
        most = "without a budget" if budget is None else f"for at most {budget} a day"
        note(f"spills {most}, beyond {changed['policy']['ttft_s']:g} s to the first token")
    note(f"idle time is {'sold by the token' if changed['resale'] else 'not sold'}")
    _show(output, changed)


@app.command(epilog="Example: market leases release lease-261101120000-1 --yes")
def release(
    lease: Lease,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """End a lease now: nothing more is charged. Asks before."""
    from market.cli.api import request

    known = request("GET", f"/leases/{lease}")
    if known["state"] != "closed":
        confirm(question(known), yes)
        known = request("POST", f"/leases/{lease}/release")
    _show(output, known)


@app.command("cancel-order", epilog="Example: market leases cancel-order order-0123456789abcdef")
def cancel_order(
    order: Annotated[str, typer.Argument(help="Id from market status or market deploy --queue.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Take an order back that waits for GPUs."""
    from market.cli.api import request

    show_orders(output, request("DELETE", f"/orders/{order}"))


def row(lease: dict[str, Any]) -> dict[str, Any]:
    """A lease as a line of a table."""
    price = lease["price_per_gpu_hour"]
    return lease | {
        "lease": lease["lease_id"],
        "tenant": lease["tenant_id"],
        "place": bars.place(lease),
        "start": bars.moment(lease["start"]),
        "end": bars.moment(lease["end"]),
        "price": f"{price} {lease['currency']}/GPU-hour",
        "credited": bars.duration(int(lease["credited_s"])),
    }


def show_orders(output: Output, answer: Any, empty: str = "no orders wait") -> None:
    """Print an order, or several."""
    if output is Output.TABLE:
        found = [answer] if isinstance(answer, dict) else answer
        answer = [
            order
            | {
                "gpus": f"{order['gpu_count'] * order['gpu_milli'] / bars.WHOLE_MILLI:g}",
                "term": bars.duration(order["term_s"]),
            }
            for order in found
        ]
    show(output, answer, ORDER, empty=empty)


def words(lease: dict[str, Any]) -> str:
    """A lease in one line."""
    return (
        f"lease {lease['lease_id']}: {bars.place(lease)} at {lease['price_per_gpu_hour']} "
        f"{lease['currency']}/GPU-hour, {bars.moment(lease['start'])} to "
        f"{bars.moment(lease['end'])}"
    )


def question(lease: dict[str, Any]) -> str:
    """What to ask before a lease ends early."""
    return (
        f"End lease {lease['lease_id']} of {lease['tenant_id']} on {bars.place(lease)} now, "
        f"before {bars.moment(lease['end'])}?"
    )


def is_later(order: dict[str, Any], lease: dict[str, Any]) -> bool:
    """Whether a lease was booked for a time to come."""
    # Without a wanted start it begins at once, whatever this machine's clock says.
    return order["start"] is not None and datetime.fromisoformat(lease["start"]) > datetime.now(UTC)


def wait_for_match(order: dict[str, Any], timeout_s: float, began_s: float) -> dict[str, Any]:
    """The lease that a queued order becomes, ``timeout_s`` after ``began_s`` (monotonic) at most.

    Raises Conflict if it was taken back, Overloaded if time is over; then it waits on.
    """
    from market.cli.api import request
    from market.errors import Conflict, Overloaded

    order_id, told = order["order_id"], order["reason"]
    while True:
        queue = {waiting["order_id"]: waiting for waiting in request("GET", "/orders")}
        if order_id not in queue:
            break
        reason = queue[order_id]["reason"]
        if reason != told:
            note(f"market: order {order_id} waits: {reason}")
            told = reason
        if time.monotonic() - began_s > timeout_s:
            raise Overloaded(
                f"order {order_id} still waits after {timeout_s:.0f} s: {told}; it stays queued "
                f"(market status shows it, market leases cancel-order {order_id} takes it back)"
            )
        time.sleep(POLL_S)
    for lease in request("GET", "/leases", params={"closed": True}):
        if lease["order_id"] == order_id:
            granted: dict[str, Any] = lease
            return granted
    raise Conflict(f"order {order_id} was taken back while it waited")


def why_closed(lease_id: str) -> str:
    """The reason of a lease's end, as the rest of a sentence."""
    from market.cli.api import request

    return f": lease {lease_id} is over, {request('GET', f'/leases/{lease_id}')['reason']}"


def _show(output: Output, lease: dict[str, Any]) -> None:
    show(output, lease if output is Output.JSON else row(lease), COLUMNS)
