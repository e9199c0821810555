"""``market join``, ``leave``, ``drain`` and ``offers``: machines with GPUs."""

import os
import re
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from market.cli import bars
from market.cli.output import Output, OutputOption, check_time, note, show

if TYPE_CHECKING:
    from market.cluster.supervisor import Membership
    from market.types import Gpu

JOINED = ("node_id", "provider_id", "gpu_type", "gpus", "logical", "ask", "market", "state")
LOGICAL_TYPE = "logical"
LOGICAL_MEMORY_GIB = 24
NODE_NAME_MAX = 40
POLL_S = 0.5
TIMEOUT_S = 30.0


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command(
        epilog="Examples: market join http://market.example:8000 --provider acme --ask 2.10 "
        "--token TOKEN; market join --provider acme --ask 0.20 --gpus 2 --token TOKEN"
    )(join)
    app.command(epilog="Example: market leave")(leave)
    app.command(epilog="Examples: market drain acme-1; market drain acme-1 --back")(drain)
    app.command(epilog="Example: market offers")(offers)


def join(  # noqa: PLR0913  # one argument per option
    provider: Annotated[str, typer.Option(help="Who sells it (market providers ls).")],
    ask: Annotated[str, typer.Option(help="Price per GPU-hour, e.g. 2.10.")],
    address: Annotated[
        str | None, typer.Argument(help="The market's address; default: MARKET_URL.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="The first time: from market providers token PROVIDER.")
    ] = None,
    node: Annotated[str | None, typer.Option(help="Name; default: PROVIDER-HOSTNAME.")] = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            help="Some of this machine's GPUs by index, e.g. 0,1; default: all. On a machine "
            "without any: how many logical ones."
        ),
    ] = None,
    gpu_type: Annotated[
        str | None, typer.Option(help=f"Type of logical GPUs; default: {LOGICAL_TYPE}.")
    ] = None,
    gpu_memory_gib: Annotated[
        int | None,
        typer.Option(min=1, help=f"Memory of each logical GPU; default: {LOGICAL_MEMORY_GIB}."),
    ] = None,
    region: Annotated[str | None, typer.Option(help="Where it stands; default: local.")] = None,
    available_from: Annotated[
        str | None,
        typer.Option("--from", callback=check_time, help="Leased from then on."),
    ] = None,
    available_until: Annotated[
        str | None, typer.Option("--until", callback=check_time, help="Leased until then at most.")
    ] = None,
    min_term: Annotated[str | None, typer.Option(help="Shortest lease, e.g. 1h.")] = None,
    max_term: Annotated[str | None, typer.Option(help="Longest lease, e.g. 30d.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Offer this machine's GPUs in a market, until market leave (again is harmless)."""
    from market.cluster import hardware, supervisor
    from market.config import Config

    config = Config.from_env(os.environ | ({} if address is None else {"MARKET_URL": address}))
    chosen, logical = _choose(hardware.gpus(), gpus, gpu_type, gpu_memory_gib)
    known = supervisor.load_membership(config.state_dir)
    facts = {
        "node_id": node or _name(provider, config.url, known),
        "provider_id": provider,
        "gpu_type": chosen[0].gpu_type if chosen else "cpu",
        "gpus": [asdict(gpu) for gpu in chosen],
        "cpu_count": hardware.cpu_count(),
        "memory_mib": hardware.memory_mib(),
        "ask": ask,
        "region": region,
        "logical": logical,
        "models_dir": str(config.models_dir),
        "available_from": available_from,
        "available_until": available_until,
        "term_min": min_term,
        "term_max": max_term,
    }
    facts = {name: value for name, value in facts.items() if value is not None}
    note(f"market: joining {config.url} as node {facts['node_id']}")
    node_id = _begin(config.state_dir, config.logs_dir, config.url, token, facts)
    note(
        "market: it stays until market leave, and finds the market again if that restarts; its log "
        f"is {config.logs_dir / supervisor.LOG}"
    )
    joined = {"node_id": node_id, "market": config.url, "state": "joined"}
    counted = {"gpus": len(chosen)} if output is Output.TABLE else {}
    show(output, facts | joined | counted, JOINED)


def leave(
    force: Annotated[
        bool,
        typer.Option("--force", help="End leases on it, and leave a market that does not answer."),
    ] = False,
    timeout_s: Annotated[float, typer.Option(help="Longest wait for replicas to end.")] = 120,
    output: OutputOption = Output.TABLE,
) -> None:
    """Take this machine out of its market: what runs on it drains and ends."""
    from market.cluster import supervisor
    from market.config import Config
    from market.errors import NotFound

    config = Config.from_env()
    member = supervisor.load_membership(config.state_dir)
    if member is None:
        raise NotFound(f"no node of {config.home} is in a market; is MARKET_HOME right?")
    if member.node_id is not None and member.node_key is not None:
        _announce(member, force)
        _wait_until_empty(config.state_dir, member.node_id, timeout_s, force)
    note("market: ending the node's processes")
    ended = supervisor.end_join(config.state_dir)
    state = "left" if ended else "left; it was not running"
    show(output, {"node_id": member.node_id, "market": member.market_url, "state": state})


def drain(
    node: Annotated[str, typer.Argument(help="Name of the node (market offers).")],
    back: Annotated[bool, typer.Option("--back", help="Match with it again.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Match nothing more with a node; what runs on it runs on."""
    from market.cli.api import request

    offer = request("POST", f"/nodes/{node}/drain", params={"back": back})
    show(output, offer, ("node_id", "provider_id", "state", "reason"))


def offers(output: OutputOption = Output.TABLE) -> None:
    """List what providers offer, with the shares of each GPU in use."""
    from market.cli.api import request

    rows = request("GET", "/offers")
    if output is Output.JSON:
        show(output, rows)
        return
    for offer in rows:
        for line in bars.node_lines(offer):
            print(line)
        if offer["state"] != "left":
            print(f"  {bars.terms_line(offer)}")
    print(bars.LEGEND if rows else "no offers; try: market join, on a machine with GPUs")


def _choose(
    found: "tuple[Gpu, ...]", wanted: str | None, gpu_type: str | None, memory_gib: int | None
) -> "tuple[tuple[Gpu, ...], bool]":
    """The GPUs to offer, and whether they are logical. Raises InvalidRequest."""
    from market.cluster import hardware
    from market.errors import InvalidRequest

    if found and (gpu_type is not None or memory_gib is not None):
        raise InvalidRequest(
            "--gpu-type and --gpu-memory-gib declare logical GPUs, but this machine has real ones"
        )
    if found:
        return _some(found, wanted), False
    if wanted is None and (gpu_type is not None or memory_gib is not None):
        raise InvalidRequest("say how many logical GPUs that are, e.g. --gpus 2")
    if wanted is None:
        note(
            "market: no GPU was found, so the CPUs alone are offered, to small models that are "
            "sold by tokens; --gpus N declares N logical GPUs, which can be leased"
        )
        return (), False
    if not wanted.isdecimal():
        raise InvalidRequest(
            f"--gpus {wanted}: no GPU was found here; say how many logical ones, e.g. --gpus 2"
        )
    memory_mib = (memory_gib or LOGICAL_MEMORY_GIB) * bars.MIB_PER_GIB
    declared = hardware.declared_gpus(int(wanted), gpu_type or LOGICAL_TYPE, memory_mib)
    note(
        f"market: no GPU was found, so these {wanted} are logical: shares of them are counted as "
        "of real ones, but models run on the CPUs"
    )
    return declared, True


def _some(found: "tuple[Gpu, ...]", wanted: str | None) -> "tuple[Gpu, ...]":
    """The GPUs with the wanted indices. Raises InvalidRequest."""
    from market.errors import InvalidRequest

    here = ", ".join(f"{gpu.index} ({gpu.gpu_type})" for gpu in found)
    names = {str(gpu.index) for gpu in found} if wanted is None else set(wanted.split(","))
    chosen = tuple(gpu for gpu in found if str(gpu.index) in names)
    if len(chosen) != len(names):
        raise InvalidRequest(f"--gpus {wanted}: choose by index, e.g. 0,1; here are {here}")
    if len({gpu.gpu_type for gpu in chosen}) > 1:
        raise InvalidRequest(f"a node has GPUs of one type; choose with --gpus: here are {here}")
    return chosen


def _name(provider: str, url: str, known: "Membership | None") -> str:
    """The node's name of before in this market, or one made of the provider's and the host's."""
    if (
        known is not None
        and known.node_id is not None
        and (known.market_url, known.node.get("provider_id")) == (url, provider)
    ):
        return known.node_id
    words = re.sub(r"[^A-Za-z0-9]+", "-", f"{provider}-{socket.gethostname().partition('.')[0]}")
    return words[:NODE_NAME_MAX].strip("-")


def _begin(
    state_dir: Path, logs_dir: Path, url: str, token: str | None, facts: dict[str, Any]
) -> str:
    """Join. Raises the market's refusal; a missing token says where to get one."""
    from market.cluster import supervisor
    from market.errors import InvalidRequest

    try:
        return supervisor.begin_join(state_dir, logs_dir, url, token, facts)
    except InvalidRequest as error:
        if error.param != "join_token":
            raise
        raise InvalidRequest(
            f"{error.message}; on the operator's machine run market providers token "
            f"{facts['provider_id']}, then here the same again with --token TOKEN"
        ) from None


def _announce(member: "Membership", force: bool) -> None:
    """Tell the market that the node leaves. Raises its refusal, e.g. while leases are on it.

    With ``force`` a market that is gone, or knows the node no more, is no obstacle.
    """
    import httpx

    from market.cli.api import raise_for_error
    from market.errors import InvalidKey, MarketError, NotFound

    url = f"{member.market_url}/market/v1/nodes/{member.node_id}/leave"
    body = {"node_key": member.node_key, "force": force}
    try:
        raise_for_error(httpx.request("POST", url, json=body, timeout=TIMEOUT_S))
    except httpx.TransportError as error:
        reason = f"no market answers at {member.market_url} ({type(error).__name__})"
        if not force:
            raise MarketError(f"{reason}; try later, or leave without a word: --force") from None
        note(f"market: {reason}; leaving without a word")
    except (InvalidKey, NotFound) as error:
        if not force:
            raise
        note(f"market: {error.message}; leaving all the same")


def _wait_until_empty(state_dir: Path, node_id: str, timeout_s: float, force: bool) -> None:
    """Wait for the end of the node's replicas. Raises MarketFault after that time, but by force.

    Their processes are here; whom else a node could ask, it has no key for.
    """
    from market.errors import MarketFault

    deadline_s = time.monotonic() + timeout_s
    told: set[str] = set()
    while left := _replicas_here(state_dir, node_id):
        if left != told:
            note(f"market: waiting for the end of {', '.join(sorted(left))}")
            told = left
        if time.monotonic() > deadline_s:
            if force:
                return
            raise MarketFault(
                f"{len(left)} replica(s) still run after {timeout_s:.0f} s; run market leave "
                "again, with --force to end them at once"
            )
        time.sleep(POLL_S)


def _replicas_here(state_dir: Path, node_id: str) -> set[str]:
    """Replicas of this node with processes on this machine."""
    from market.cluster.agent import by_replica, marks_of
    from market.cluster.node import RECORD_VARIABLE, WORKER_RECORD, environments

    record = str(state_dir.resolve() / WORKER_RECORD)
    running = ((process.pid, environ) for process, environ in environments())
    return set(by_replica(running, marks_of(node_id, {RECORD_VARIABLE: record})))
