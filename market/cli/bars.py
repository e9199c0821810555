"""Text pictures of GPUs, and words for places and times. Pure: what time it is comes in."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

CELLS = 20
LEASE, POOL, WAITING, ENDING, FREE = "#", "=", "+", "-", "·"
LEGEND = f"{LEASE} lease   {POOL} pool   {WAITING} waiting   {ENDING} ending   {FREE} free"
WHOLE_MILLI = 1000
MIB_PER_GIB = 1024

_GONE = ("stopping", "freeing")
_UNITS_S = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))


def bar(used: Sequence[Mapping[str, Any]], cells: int = CELLS) -> str:
    """A GPU as ``cells`` characters: each use a run of its mark as long as its share.

    ``used`` are rows with milli, mode and state. No use and no free rest is too small to be seen,
    as long as there are cells enough. What waits comes last and gets what the others leave: it may
    be booked for a time after theirs.
    """
    marks, shares, left = [], [], WHOLE_MILLI
    for use in sorted(used, key=lambda use: use["state"] == "waiting"):
        share = min(int(use["milli"]), left)
        left -= share
        marks.append(_mark(use))
        shares.append(share)
    widths = _widths([*shares, left], cells)
    return "".join(mark * width for mark, width in zip([*marks, FREE], widths, strict=True))


def gpu_line(gpu: Mapping[str, Any]) -> str:
    """One GPU of an offer: its bar, and in words what is on it."""
    words = ", ".join(_words(use) for use in gpu["used"]) or "free"
    return f"gpu {gpu['index']} [{bar(gpu['used'])}] {words}"


def node_lines(offer: Mapping[str, Any]) -> list[str]:
    """An offer's node: what it is and asks in one line, then a line for each GPU."""
    facts = [
        f"provider {offer['provider_id']}",
        _hardware(offer),
        f"ask {offer['ask']} {offer['currency']}/GPU-hour",
        f"region {offer['region']}",
        offer["state"] + (f": {offer['reason']}" if offer["reason"] else ""),
    ]
    if offer["state"] == "left":
        return [f"{offer['node_id']}   left"]
    return [
        f"{offer['node_id']}   {', '.join(facts)}",
        *(f"  {gpu_line(gpu)}" for gpu in offer["gpus"]),
    ]


def terms_line(offer: Mapping[str, Any]) -> str:
    """For how long and when an offer can be leased."""
    times = [
        f"{word} {moment(offer[name])}"
        for word, name in (("from", "available_from"), ("until", "available_until"))
        if offer[name] is not None
    ]
    shortest = duration(offer["term_min_s"]) if offer["term_min_s"] else "any"
    terms = f"terms {shortest} to {duration(offer['term_max_s'])}"
    return ", ".join([terms, *times])


def place(where: Mapping[str, Any]) -> str:
    """Node, GPUs and share of a row that has them: ``acme-1 gpu 0 x0.5``, ``local cpus``."""
    if not where["gpu_milli"]:
        return f"{where['node_id']} cpus"
    indices = ",".join(str(index) for index in where["gpu_indices"])
    gpus = f"gpu {indices}" if indices else "any gpu"
    share = "" if where["gpu_milli"] == WHOLE_MILLI else f" x{where['gpu_milli'] / WHOLE_MILLI:g}"
    return f"{where['node_id']} {gpus}{share}"


def places(deployment: Mapping[str, Any]) -> str:
    """Where a deployment's replicas are."""
    return "; ".join(place(where) for where in deployment["places"]) or "-"


def moment(text: str) -> str:
    """An ISO time as people read it, in UTC, to the second."""
    return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def remaining(until: str, now: datetime) -> str:
    """How long it is from ``now`` until an ISO time; ``over`` if that has passed."""
    seconds = (datetime.fromisoformat(until) - now).total_seconds()
    return duration(int(seconds)) if seconds > 0 else "over"


def duration(seconds: int) -> str:
    """The two largest units of a time: ``29d 23h``, ``59m 10s``, ``0s``."""
    parts: list[tuple[int, str]] = []
    for unit, length_s in _UNITS_S:
        count, seconds = divmod(seconds, length_s)
        if parts or count:
            parts.append((count, unit))
    return " ".join(f"{count}{unit}" for count, unit in parts[:2] if count) or "0s"


def _widths(parts: Sequence[int], cells: int) -> list[int]:
    """Whole cells in proportion to parts of a GPU: the largest remainders are rounded up."""
    ideal = [part * cells / WHOLE_MILLI for part in parts]
    widths = [max(1, int(width)) if width else 0 for width in ideal]
    numbers = range(len(widths))
    while sum(widths) > cells:
        widths[max(numbers, key=widths.__getitem__)] -= 1
    while sum(widths) < cells:
        widths[max(numbers, key=lambda number: ideal[number] - widths[number])] += 1
    return widths


def _mark(use: Mapping[str, Any]) -> str:
    if use["state"] in _GONE:
        return ENDING
    if use["state"] == "waiting":
        return WAITING
    return POOL if use["mode"] == "tokens" else LEASE


def _words(use: Mapping[str, Any]) -> str:
    kind = "pool" if use["mode"] == "tokens" else "lease"
    state = "" if use["state"] == "ready" else f" ({use['state']})"
    return f"{use['milli'] / WHOLE_MILLI:g} {use['model']} {kind}{state}"


def _hardware(offer: Mapping[str, Any]) -> str:
    gpus = offer["gpus"]
    if not gpus:
        return f"no GPU, {offer['cpu_count']} CPUs, {offer['memory_mib'] // MIB_PER_GIB} GiB"
    memory = min(gpu["memory_mib"] for gpu in gpus) / MIB_PER_GIB
    logical = " (logical)" if offer["logical"] else ""
    return f"{len(gpus)} x {offer['gpu_type']} {memory:.3g} GiB{logical}"
