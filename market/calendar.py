"""The booking calendar: which GPUs are promised to whom, from when until when.

Exact: a step function of time for every GPU and node. Times are integers of any one unit,
intervals are [start, end). A booking of *any* GPU waits for one until its start, so that nobody
is ever moved for it. One rule is kept at every instant of every node:

    claims <= GPUs: a waiting booking claims one from its start to its end, and a GPU is claimed
    until the end of its last fixed booking (of exact GPUs, or of any one and bound to it).

Then who waits gets a GPU at its start, whatever is booked or cut meanwhile. Proof: of those that
wait take the one that starts first, at s. It is one of the claims at s, so fixed bookings claim
fewer GPUs than there are: one has nothing fixed at s or later and is free until whatever end.
Binding keeps the rule: from s on the GPU's claim replaces the booking's, before s nobody waits.
Bookings are checked against the rule; cutting and time only lower claims. (Left-edge argument of
channel routing: Hashimoto and Stevens, Wire Routing by Optimizing Channel Assignment within Large
Apertures, DAC 1971. Whether those that wait also fit *before* what is fixed is precoloring
extension of interval graphs, NP-complete: Biro, Hujter and Tuza, 1992.)

Any part of what keeps the rule keeps it: after a restart all bookings can be made again in any
order, those that have GPUs with ``book``, those that wait with ``book_any``.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NoReturn, TypeVar

import msgspec

GPU_MILLI = 1000
FOREVER = 2**63 - 1  # the end of open-ended bookings
_PAST = -FOREVER
_Thing = TypeVar("_Thing")


class Oversubscribed(Exception):
    """No room on this GPU (None: on any), first ``at``; before the start if others wait for it."""

    def __init__(self, node_id: str, gpu: int | None, at: int) -> None:
        super().__init__(node_id, gpu, at)
        self.node_id, self.gpu, self.at = node_id, gpu, at

    def __str__(self) -> str:
        what = "no GPU" if self.gpu is None else f"no room on GPU {self.gpu}"
        return f"{what} of {self.node_id} at {self.at}"


class _Booking(msgspec.Struct, frozen=True):
    """``gpu_milli`` of each of the GPUs; while it waits for any, ``gpu_indices`` is empty."""

    booking_id: str
    node_id: str
    gpu_indices: tuple[int, ...]
    gpu_milli: int
    start: int
    end: int


class _Profile:
    """A step function of time: ``values[i]`` from ``times[i]`` on; the last step is down to 0."""

    def __init__(self) -> None:
        self.times = [_PAST]
        self.values = [0]

    def highest(self, start: int, end: int) -> int:
        """The greatest value in [start, end)."""
        first = bisect_right(self.times, start) - 1
        after = bisect_left(self.times, end, first)
        return max(self.values[first:after]) if after > first + 1 else self.values[first]

    def first_above(self, limit: int, start: int, end: int) -> int | None:
        """The first instant of [start, end) whose value exceeds the limit; None if none does."""
        if self.highest(start, end) <= limit:
            return None
        index = bisect_right(self.times, start) - 1
        while self.values[index] <= limit:
            index += 1
        return max(start, self.times[index])

    def add(self, amount: int, start: int, end: int) -> None:
        """Add to all of [start, end)."""
        times, values = self.times, self.values
        first = bisect_left(times, start)
        if first == len(times) or times[first] != start:
            times.insert(first, start)
            values.insert(first, values[first - 1])
        after = bisect_left(times, end, first)
        if after == len(times) or times[after] != end:
            times.insert(after, end)
            values.insert(after, values[after - 1])
        values[first:after] = [value + amount for value in values[first:after]]
        if values[after] == values[after - 1]:
            del times[after], values[after]
        if first and values[first] == values[first - 1]:
            del times[first], values[first]

    def forget(self, now: int) -> None:
        """Drop the steps up to ``now``: what holds then has always held."""
        first = bisect_right(self.times, now) - 1
        self.values[0] = self.values[first]
        del self.times[1 : first + 1], self.values[1 : first + 1]


class _Node:
    """``gpus``: milli fixed on each. ``claims``: as ruled. ``load``: milli of all less capacity."""

    def __init__(self) -> None:
        self.gpus: list[_Profile] = []
        self.claims = _Profile()
        self.load = _Profile()
        # A last change beyond all bookings: ``best_node`` need not ask whether there is a next.
        self.load.times.append(FOREVER)
        self.load.values.append(1)
        self.bookings: dict[str, _Booking] = {}
        self.changes = 0

    def blocked(self, booking: _Booking, start: int) -> tuple[int, int | None] | None:
        """When and where (None: on all GPUs) it lacks something from start on; None if it fits."""
        limit, end = GPU_MILLI - booking.gpu_milli, booking.end
        for index in booking.gpu_indices:
            if (at := self.gpus[index].first_above(limit, start, end)) is not None:
                return at, index
        if booking.gpu_indices:
            return self.overclaimed(booking.gpu_indices, end)
        at = self.claims.first_above(len(self.gpus) - 1, start, end)
        return None if at is None else (at, None)

    def add(self, sign: int, booking: _Booking, start: int) -> None:
        """Add (1) or take away (-1) what the booking needs from start to its end."""
        self.changes += 1
        milli, end = sign * booking.gpu_milli, booking.end
        for index in booking.gpu_indices:
            gpu = self.gpus[index]
            claimed_until = gpu.times[-1]
            gpu.add(milli, start, end)
            low, high = sorted((claimed_until, gpu.times[-1]))
            if low < high:
                self.claims.add(sign, low, high)
        if not booking.gpu_indices:
            self.claims.add(sign, start, end)
        self.load.add(milli * (len(booking.gpu_indices) or 1), start, end)

    def overclaimed(self, indices: Sequence[int], end: int) -> tuple[int, int] | None:
        """When and on which GPU the rule first breaks if all of these are claimed until end."""
        lasts = [(last, index) for index in indices if (last := self.gpus[index].times[-1]) < end]
        breaks = []
        for rank, (last, index) in enumerate(sorted(lasts), 1):
            if (at := self.claims.first_above(len(self.gpus) - rank, last, end)) is not None:
                breaks.append((at, index))
        return min(breaks, default=None)

    def together(self, indices: Sequence[int], end: int, count: int) -> list[int]:
        """The first ``count`` of the GPUs that may all be claimed until end.

        As many as can be: the rule limits members of a chain of sets, a matroid, so greed is best.
        """
        taken: list[int] = []
        for index in indices:
            if len(taken) < count and not self.overclaimed([*taken, index], end):
                taken.append(index)
        return taken

    def pick(self, count: int, milli: int, start: int, end: int) -> tuple[int, ...] | None:
        options = []
        for index, gpu in enumerate(self.gpus):
            free = GPU_MILLI - gpu.highest(start, end)
            if free >= milli:
                options.append((free, -min(gpu.times[-1], end), index))
        if len(options) < count:
            return None
        picked = self.together([index for _, _, index in sorted(options)], end, count)
        return tuple(sorted(picked)) if len(picked) == count else None

    def may_wait(self, start: int, end: int) -> bool:
        """Whether a booking of any GPU can wait. With one GPU there is nothing to wait for."""
        return len(self.gpus) > 1 and self.claims.highest(start, end) < len(self.gpus)

    def fits(self, count: int, milli: int, start: int, end: int) -> bool:
        """Whether ``book_any`` of a whole GPU, else ``book`` on what is picked, goes through."""
        if self.load.highest(start, end) + count * milli > 0:
            return False
        waits = count == 1 and milli == GPU_MILLI and self.may_wait(start, end)
        return waits or self.pick(count, milli, start, end) is not None


class _Known(dict[str, _Thing]):
    def __missing__(self, key: str) -> NoReturn:
        raise ValueError(f"unknown: {key}")


class Calendar:
    """What is booked on the nodes it is told of, until cut or expired. ``end=None``: open-ended.

    Times before the last ``expire`` are as that instant. All methods raise ValueError for a node
    or booking they do not know and for what is no booking (ends before it starts, or is past ...).
    """

    def __init__(self) -> None:
        self._nodes: _Known[_Node] = _Known()
        self._bookings: _Known[_Booking] = _Known()
        self._expired = _PAST

    def set_node(self, node_id: str, gpu_count: int) -> None:
        """Add a node, or add or remove its last GPUs. Raises ValueError if bookings need them."""
        node = self._nodes.get(node_id) or _Node()
        fixed = any(gpu.times[-1] > _PAST for gpu in node.gpus[gpu_count:])
        if gpu_count < 0 or fixed or node.claims.highest(_PAST, FOREVER) > gpu_count:
            raise ValueError(f"{node_id} cannot have only {gpu_count} GPUs")
        node.load.add(GPU_MILLI * (len(node.gpus) - gpu_count), _PAST, FOREVER)
        del node.gpus[gpu_count:]
        node.gpus += [_Profile() for _ in range(gpu_count - len(node.gpus))]
        self._nodes[node_id] = node

    def remove_node(self, node_id: str) -> None:
        """Forget a node. Raises ValueError while bookings reach into it."""
        if self._nodes[node_id].bookings:
            raise ValueError(f"{node_id} has bookings")
        del self._nodes[node_id]

    def book(
        self,
        booking_id: str,
        node_id: str,
        gpu_indices: tuple[int, ...],
        gpu_milli: int,
        start: int,
        end: int | None,
    ) -> None:
        """Fix ``gpu_milli`` on each of these GPUs. Raises Oversubscribed and changes nothing."""
        stop = self._exact(node_id, gpu_indices, gpu_milli, start, end)
        self._put(_Booking(booking_id, node_id, gpu_indices, gpu_milli, start, stop), start)

    def book_any(self, booking_id: str, node_id: str, start: int, end: int | None) -> int | None:
        """Promise one whole GPU; which is decided by ``bind``. Raises Oversubscribed like ``book``.

        If the rule lets nobody wait, but a GPU is free in a gap before what is fixed on it, that
        one is fixed at once and returned.
        """
        node, stop = self._nodes[node_id], self._stop(start, end)
        early = None if node.may_wait(start, stop) else node.pick(1, GPU_MILLI, start, stop)
        self._put(_Booking(booking_id, node_id, early or (), GPU_MILLI, start, stop), start)
        return early[0] if early else None

    def bind(self, booking_id: str) -> int:
        """Fix the GPU of a booking that waits, at its start: the lowest free one. Or say it again.

        Early is possible too and gives ``book`` room behind it. Raises ValueError if one that
        starts before needs the GPU: bind in the order of starts.
        """
        booking = self._bookings[booking_id]
        if booking.gpu_indices:
            return booking.gpu_indices[0]
        node, start = self._nodes[booking.node_id], self._since(booking.start)
        for index, gpu in enumerate(node.gpus):
            if gpu.times[-1] <= start and not node.overclaimed([index], start):
                bound = msgspec.structs.replace(booking, gpu_indices=(index,))
                node.add(-1, booking, start)
                node.add(1, bound, start)
                self._keep(bound)
                return index
        raise ValueError(f"one that starts before {booking_id} waits on {booking.node_id}")

    def extend(self, booking_id: str, end: int | None) -> None:
        """Let it end later, where it is. Raises Oversubscribed and changes nothing."""
        booking = self._bookings[booking_id]
        stop = self._stop(booking.start, end)
        if stop < booking.end:
            raise ValueError(f"{booking_id} ends at {booking.end}: cut makes it shorter")
        if stop > booking.end:
            self._put(msgspec.structs.replace(booking, end=stop), booking.end)

    def cut(self, booking_id: str, at: int) -> None:
        """Leave nothing of it from ``at`` on: released early, or cancelled if not started then."""
        booking = self._bookings[booking_id]
        if at < booking.end:
            node = self._nodes[booking.node_id]
            node.add(-1, booking, self._since(max(at, booking.start)))
            self._keep(msgspec.structs.replace(booking, end=at))

    def expire(self, now: int) -> None:
        """Forget what ended until now; what is running stays."""
        self._expired = max(self._expired, now)
        for node in self._nodes.values():
            for booking in [b for b in node.bookings.values() if b.end <= now]:
                del self._bookings[booking.booking_id], node.bookings[booking.booking_id]
            for profile in (*node.gpus, node.load, node.claims):
                profile.forget(now)

    def room(self, node_id: str, start: int, end: int | None) -> tuple[int, ...]:
        """Free milli of every GPU over the whole interval: ``book`` gives all of it or any part.

        GPUs needed for bookings that wait show 0: if only some can be had, those with most room
        can, among equals the lowest indices.
        """
        node, stop = self._nodes[node_id], self._stop(start, end)
        free = [GPU_MILLI - gpu.highest(start, stop) for gpu in node.gpus]
        some = sorted((i for i, milli in enumerate(free) if milli), key=lambda i: (-free[i], i))
        had = node.together(some, stop, len(some))
        return tuple([milli if index in had else 0 for index, milli in enumerate(free)])

    def changes(self, node_id: str) -> int:
        """Grows with every booking there that is made, changed or cut: room is as it was, else."""
        return self._nodes[node_id].changes

    def any_room(self, node_id: str, start: int, end: int | None) -> bool:
        """Whether ``book_any`` would go through."""
        return self._nodes[node_id].fits(1, GPU_MILLI, start, self._stop(start, end))

    def pick(
        self, node_id: str, gpu_count: int, gpu_milli: int, start: int, end: int | None
    ) -> tuple[int, ...] | None:
        """GPUs that ``book`` can have, lowest first; None if there are not so many.

        Those with the least room come first, then those claimed longest: what is left is whole.
        """
        stop = self._stop(start, end, gpu_count, gpu_milli)
        return self._nodes[node_id].pick(gpu_count, gpu_milli, start, stop)

    def earliest(
        self, node_id: str, gpu_count: int, gpu_milli: int, duration: int, after: int
    ) -> int | None:
        """The first start from ``after`` on at which it fits (see ``best_node``), None if never."""
        self._stop(after, after + duration, gpu_count, gpu_milli)
        node = self._nodes[node_id]
        # Room grows nowhere but where a booking ends.
        ends = {b.end for b in node.bookings.values() if after < b.end < FOREVER - duration}
        for start in (after, *sorted(ends)):
            if node.fits(gpu_count, gpu_milli, start, start + duration):
                return start
        return None

    def best_node(
        self, node_ids: Sequence[str], gpu_count: int, gpu_milli: int, start: int, end: int | None
    ) -> str | None:
        """The node on which it fits and wastes the least time; None if it fits on none.

        One whole GPU fits where ``book_any`` goes through, all else where ``pick`` finds GPUs.
        Wasted is the time since the node's load last changed and until it next does, endless if it
        never did or will: empty nodes come last. Ties end on node ids.
        """
        stop = self._stop(start, end, gpu_count, gpu_milli)
        nodes, most = self._nodes, -gpu_count * gpu_milli
        ranked = []
        for node_id in node_ids:
            load = nodes[node_id].load
            times = load.times
            first = bisect_right(times, start) - 1
            # Most nodes of a full cluster are refused here, by their load at the start alone.
            if load.values[first] <= most:
                after = bisect_left(times, stop, first)
                ranked.append((times[after] - times[first], node_id))
        for _, node_id in sorted(ranked):
            if nodes[node_id].fits(gpu_count, gpu_milli, start, stop):
                return node_id
        return None

    def conflicts(
        self, node_id: str, gpu_indices: Sequence[int], gpu_milli: int, start: int, end: int | None
    ) -> tuple[str, ...]:
        """Ids of the bookings in the way of ``book``, in the order in which they were made."""
        stop, node = self._exact(node_id, gpu_indices, gpu_milli, start, end), self._nodes[node_id]
        broken = node.overclaimed(gpu_indices, stop)
        needed_at = max(broken[0], self._expired) if broken else _PAST
        found = []
        for booking in node.bookings.values():
            low, high = max(start, booking.start), min(stop, booking.end)
            shared = [node.gpus[i] for i in booking.gpu_indices if i in gpu_indices and low < high]
            waits = not booking.gpu_indices and booking.start <= needed_at < booking.end
            if waits or any(gpu.highest(low, high) > GPU_MILLI - gpu_milli for gpu in shared):
                found.append(booking.booking_id)
        return tuple(found)

    def _exact(
        self, node_id: str, gpu_indices: Sequence[int], gpu_milli: int, start: int, end: int | None
    ) -> int:
        there = range(len(self._nodes[node_id].gpus))
        if len({*gpu_indices} & {*there}) < len(gpu_indices):
            raise ValueError(f"{node_id} has not the GPUs {gpu_indices}")
        return self._stop(start, end, len(gpu_indices), gpu_milli)

    def _stop(self, start: int, end: int | None, count: int = 1, milli: int = GPU_MILLI) -> int:
        stop = FOREVER if end is None else end
        known = start > _PAST and max(start, self._expired) < stop <= FOREVER
        if not known or count < 1 or not 1 <= milli <= GPU_MILLI:
            raise ValueError(f"no booking: {milli} milli of {count} GPUs from {start} to {end}")
        return stop

    def _since(self, start: int) -> int:
        return start if start > self._expired else _PAST

    def _put(self, booking: _Booking, since: int) -> None:
        if since == booking.start and booking.booking_id in self._bookings:
            raise ValueError(f"booking id used before: {booking.booking_id}")
        node, start = self._nodes[booking.node_id], self._since(since)
        if blocked := node.blocked(booking, start):
            raise Oversubscribed(booking.node_id, blocked[1], max(blocked[0], self._expired))
        node.add(1, booking, start)
        self._keep(booking)

    def _keep(self, booking: _Booking) -> None:
        bookings = self._nodes[booking.node_id].bookings
        if max(booking.start, self._expired) < booking.end:
            self._bookings[booking.booking_id] = bookings[booking.booking_id] = booking
        else:
            del self._bookings[booking.booking_id], bookings[booking.booking_id]
