"""Orders × offers → a place at a price, or the reason why not. Pure and deterministic.

The cheapest offer that fits wins; among equal asks placement decides; ties end on ids.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from market import placement
from market.calendar import Calendar
from market.catalog import Model
from market.placement import Classes, GpuRoom, NodeRoom, ShareRequest
from market.pricing import format_money
from market.types import Offer, OfferState, Order, Place

MIB_PER_GIB = 1024
WHOLE_MILLI = 1000
EPOCH = datetime(1970, 1, 1)
MICRO = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Match:
    """A place for an order at an offer's ask. ``place`` has no indices if any one GPU will do."""

    order: Order
    offer: Offer
    place: Place
    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True)
class Misfit:
    """Why nothing fits, as a sentence for people; when it could start, if it ever can."""

    reason: str
    earliest: datetime | None = None


def micros(moment: datetime) -> int:
    """A moment as the calendar counts: microseconds since 1970."""
    return (moment.replace(tzinfo=None) - EPOCH) // MICRO


def match(
    order: Order,
    model: Model,
    offers: Sequence[Offer],
    calendar: Calendar,
    now: datetime,
    classes: Classes = (),
    on_disk: Mapping[str, Collection[str]] | None = None,
) -> Match | Misfit:
    """The cheapest place for a lease, bound to GPUs if it starts now.

    Then one whose node has the model on its disk (``on_disk``, by node) comes before others at the
    same price.
    """
    start = max(order.start or now, now)
    end = start + timedelta(seconds=order.term_s)
    against = {o.offer_id: _against(order, model, o, start, end) for o in offers}
    suitable = [offer for offer in offers if not against[offer.offer_id]]
    later = order.start is not None and start > now
    for ask_pico in sorted({offer.ask_pico for offer in suitable}):
        same = [offer for offer in suitable if offer.ask_pico == ask_pico]
        near = [
            o for o in same if on_disk and not later and model.name in on_disk.get(o.node_id, ())
        ]
        for some in (near, same):
            found = _pick(order, model, some, calendar, (start, end), later, classes)
            if found is not None:
                return found
    earliest = _earliest(order, model, offers, calendar, start)
    reasons = [(o, against[o.offer_id] or _no_room(order, o, calendar, start, end)) for o in offers]
    return Misfit(_explain(order, reasons, earliest), earliest)


def _pick(
    order: Order,
    model: Model,
    offers: Sequence[Offer],
    calendar: Calendar,
    span: tuple[datetime, datetime],
    later: bool,
    classes: Classes,
) -> Match | None:
    start, end = span
    if later and order.gpu_count == 1 and order.gpu_milli == 1000:
        # Which GPU is decided at the start: so no booking stands in another's way for nothing.
        by_node = {o.node_id: o for o in offers}
        fitting = [n for n in by_node if calendar.any_room(n, micros(start), micros(end))]
        node_id = calendar.best_node(sorted(fitting), 1, 1000, micros(start), micros(end))
        node_id = node_id or min(fitting, default=None)
        if node_id is not None:
            offer = by_node[node_id]
            return Match(order, offer, Place(offer.offer_id, node_id, (), 1000), start, end)
    rooms = [node_room(o, calendar.room(o.node_id, micros(start), micros(end))) for o in offers]
    # One request for all: offers differ in memory, which went with the share already.
    request = ShareRequest(order.gpu_count, order.gpu_milli, 0)
    chosen = placement.choose(rooms, request, classes)
    if chosen is None:
        return None
    offer = next(o for o in offers if o.node_id == chosen.node_id)
    place = Place(
        offer.offer_id, offer.node_id, indices(offer, chosen.gpu_indices), order.gpu_milli
    )
    return Match(order, offer, place, start, end)


def can_hold(offer: Offer, model: Model) -> bool:
    """Whether a node's GPUs together, or its CPUs, are large enough for a model."""
    memory_mib = sum(gpu.memory_mib for gpu in offer.gpus)
    return model.runs_on_cpu or (not offer.logical and memory_mib >= model.memory_mib)


def node_room(offer: Offer, free_milli: Sequence[int]) -> NodeRoom:
    """An offer's node with what is free of each GPU."""
    return NodeRoom(
        node_id=offer.node_id,
        gpu_type=offer.gpu_type,
        cpu_milli=offer.cpu_count * 1000,
        memory_mib=offer.memory_mib,
        gpus=tuple(
            GpuRoom(free, gpu.memory_mib * free // 1000, gpu.domain)
            for gpu, free in zip(offer.gpus, free_milli, strict=True)
        ),
    )


def indices(offer: Offer, positions: Iterable[int]) -> tuple[int, ...]:
    """Physical GPU indices of places in the offer's list."""
    return tuple(offer.gpus[position].index for position in positions)


def positions(offer: Offer, gpu_indices: Iterable[int]) -> tuple[int, ...]:
    """Places in the offer's list of physical GPU indices. Raises KeyError for an unknown one."""
    known = {gpu.index: position for position, gpu in enumerate(offer.gpus)}
    return tuple(known[index] for index in gpu_indices)


def _against(  # one line per rule
    order: Order, model: Model, offer: Offer, start: datetime, end: datetime
) -> str:
    """The first thing that speaks against an offer whatever runs on it; empty if nothing does."""
    memory_mib = min((gpu.memory_mib for gpu in offer.gpus), default=0)
    share_mib = order.gpu_count * order.gpu_milli * memory_mib // 1000
    if offer.state is not OfferState.OPEN:
        return f"is {offer.state}" + (f" ({offer.reason})" if offer.reason else "")
    if not offer.gpus:
        return "has no GPU"
    if order.provider_id is not None and offer.provider_id != order.provider_id:
        return f"is of another provider than {order.provider_id}"
    if order.region is not None and offer.region != order.region:
        return f"is in region {offer.region}, not {order.region}"
    if order.gpu_type is not None and offer.gpu_type != order.gpu_type:
        return f"has {offer.gpu_type}, not {order.gpu_type}"
    if order.gpu_memory_mib is not None and memory_mib < order.gpu_memory_mib:
        return f"has GPUs of {memory_mib // MIB_PER_GIB} GiB, not {_gib(order.gpu_memory_mib)}"
    if len(offer.gpus) < order.gpu_count:
        return f"has only {len(offer.gpus)} GPU(s)"
    if share_mib < model.memory_mib:
        have = f"{_share(order)} of {offer.gpu_type} has {share_mib // MIB_PER_GIB}"
        return f"is too small: {model.name} needs {_gib(model.memory_mib)} GiB, {have}"
    if offer.logical and not model.runs_on_cpu:
        return f"has logical GPUs only, and {model.name} does not run on CPUs"
    if order.max_price_pico is not None and offer.ask_pico > order.max_price_pico:
        return f"asks {format_money(offer.ask_pico)} per GPU-hour"
    if not offer.term_min_s <= order.term_s <= offer.term_max_s:
        return f"takes terms of {_term(offer.term_min_s)} to {_term(offer.term_max_s)}"
    if offer.available_from is not None and start < offer.available_from:
        return f"is available from {_clock(offer.available_from)} on"
    if offer.available_until is not None and end > offer.available_until:
        return f"is available until {_clock(offer.available_until)}"
    return ""


def _no_room(order: Order, offer: Offer, calendar: Calendar, start: datetime, end: datetime) -> str:
    free = calendar.room(offer.node_id, micros(start), micros(end))
    if order.gpu_count == 1:
        return f"has at most {max(free, default=0) / 1000:g} of a GPU free for the whole term"
    whole = sum(share >= order.gpu_milli for share in free)
    return f"has {whole} of {len(free)} GPUs free for the whole term"


def _explain(order: Order, reasons: Sequence[tuple[Offer, str]], earliest: datetime | None) -> str:
    if not reasons:
        return "nobody offers GPUs here (market join, on a machine with some)"
    offers_by_reason: dict[str, list[str]] = defaultdict(list)
    for offer, reason in sorted(reasons, key=lambda pair: pair[0].offer_id):
        offers_by_reason[reason].append(offer.offer_id)
    parts = [
        f"{', '.join(names)}{' each' if len(names) > 1 else ''} {reason}"
        for reason, names in offers_by_reason.items()
    ]
    hint = f"; it would fit from {_clock(earliest)} on" if earliest is not None else ""
    return f"no offer has room for {_share(order)}: {'; '.join(parts)}{hint}"


def _earliest(
    order: Order, model: Model, offers: Sequence[Offer], calendar: Calendar, after: datetime
) -> datetime | None:
    """The first start at which some offer has room for the whole term."""
    term = timedelta(seconds=order.term_s)
    found = []
    for offer in offers:
        start = max(after, offer.available_from or after)
        if _against(order, model, offer, start, start + term):
            continue
        shape = (order.gpu_count, order.gpu_milli, term // MICRO)
        moment_us = calendar.earliest(offer.node_id, *shape, micros(start))
        if moment_us is None:
            continue
        moment = start + (moment_us - micros(start)) * MICRO
        if offer.available_until is None or moment + term <= offer.available_until:
            found.append(moment)
    return min(found, default=None)


# -- pools ---------------------------------------------------------------------------------


def takes_pools(offer: Offer, now: datetime) -> bool:
    """Whether a pool's replica may go there: it is offered now, and without an end."""
    begun = offer.available_from is None or offer.available_from <= now
    return offer.state is OfferState.OPEN and offer.available_until is None and begun


def runs_on(model: Model, offer: Offer) -> bool:
    """Whether a model can run on a node's GPUs, if they are large enough."""
    return bool(offer.gpus) and (model.runs_on_cpu or not offer.logical)


def share_milli(model: Model, offer: Offer) -> int | None:
    """The part of one GPU of a node that a pool's replica needs; None if it cannot run on one."""
    if not runs_on(model, offer):
        return None
    milli = -(-model.memory_mib * 1000 // min(gpu.memory_mib for gpu in offer.gpus))
    return milli if milli <= WHOLE_MILLI else None


def hour_pico(offer: Offer, gpu_milli: int) -> int:
    """What an hour of so much of a GPU costs."""
    return offer.ask_pico * gpu_milli // WHOLE_MILLI


def place_pool(
    model: Model,
    replicas: int,
    offers: Sequence[Offer],
    free_milli: Mapping[str, Sequence[int]],
    cpu_memory_mib: Mapping[str, int],
    now: datetime,
    on_disk: Mapping[str, Collection[str]],
    in_memory: Mapping[str, Collection[str]],
) -> tuple[Place, ...] | Misfit:
    """Places for a pool's replicas without an end: shares of GPUs, cheapest first, else CPUs.

    By offer, ``free_milli`` is what is free of each GPU without an end, and ``cpu_memory_mib`` what
    is taken of the memory of nodes without GPUs. Among equals a node is preferred that has the
    model in its memory, then one that has it on its disk (``in_memory``, ``on_disk``, by node).
    """
    usable = [offer for offer in offers if takes_pools(offer, now)]
    free = {o.offer_id: [*free_milli[o.offer_id]] for o in usable if runs_on(model, o)}
    fitting = []
    for offer in usable:
        share = share_milli(model, offer)
        if share is not None:
            homes = [model.name in there.get(offer.node_id, ()) for there in (on_disk, in_memory)]
            fitting.append((offer.ask_pico, share, homes.count(False), offer.offer_id, offer))
    fitting.sort(key=lambda option: option[:4])
    taken = dict(cpu_memory_mib)
    places: list[Place] = []
    for _ in range(replicas):
        place = _gpu_place(fitting, free) or _cpu_place(model, usable, taken)
        if place is None:
            times = f"{replicas} times " if replicas > 1 else ""
            return Misfit(f"{model.name} needs {times}{_need(model)}; {_have(usable, free, taken)}")
        places.append(place)
    return tuple(places)


def _gpu_place(
    fitting: Iterable[tuple[int, int, int, str, Offer]], free: dict[str, list[int]]
) -> Place | None:
    """The first of these (ask, share, what its node lacks, offer) with room, which it takes."""
    for _, share, _, _, offer in fitting:
        room = free[offer.offer_id]
        if max(room) < share:
            continue
        chosen = placement.choose([node_room(offer, room)], ShareRequest(1, share, 0), ())
        if chosen is not None:
            (position,) = chosen.gpu_indices
            room[position] -= share
            gpu_indices = indices(offer, chosen.gpu_indices)
            return Place(offer.offer_id, offer.node_id, gpu_indices, share)
    return None


def _cpu_place(model: Model, offers: Sequence[Offer], taken: dict[str, int]) -> Place | None:
    if not model.runs_on_cpu:
        return None
    for offer in sorted((o for o in offers if not o.gpus), key=lambda o: o.offer_id):
        used = taken.get(offer.offer_id, 0) + model.memory_mib
        if used <= offer.memory_mib:
            taken[offer.offer_id] = used
            return Place(offer.offer_id, offer.node_id)
    return None


def _need(model: Model) -> str:
    gib = _gib(model.memory_mib)
    if model.runs_on_cpu:
        return f"{gib} GiB of memory or 1 GPU with {gib} GiB free"
    return f"1 GPU with {gib} GiB free"


def _have(
    offers: Sequence[Offer], free: Mapping[str, Sequence[int]], taken: Mapping[str, int]
) -> str:
    room = [
        gpu.memory_mib * milli // 1000
        for offer in offers
        for gpu, milli in zip(offer.gpus, free.get(offer.offer_id, ()), strict=False)
    ]
    if room:
        return f"the freest of this cluster's {len(room)} has {max(room) // MIB_PER_GIB} GiB"
    left = [o.memory_mib - taken.get(o.offer_id, 0) for o in offers if not o.gpus]
    memory = max(left, default=0) // MIB_PER_GIB
    return f"this cluster has none (its freest node has {memory} GiB of memory left)"


def _share(order: Order) -> str:
    if order.gpu_milli < 1000:
        return f"{order.gpu_milli / 1000:g} of a GPU"
    return f"{order.gpu_count} GPU(s)"


def _term(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    if days and not rest:
        return f"{days} d"
    hours, rest = divmod(seconds, 3_600)
    return f"{hours} h" if not rest else f"{seconds} s"


def _clock(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _gib(mib: int) -> int:
    return -(-mib // MIB_PER_GIB)
