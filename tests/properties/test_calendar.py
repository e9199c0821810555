"""Random bookings against the calendar's rule, looked up instant by instant in a plain list."""

import random
from dataclasses import dataclass, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from market.calendar import Calendar, Oversubscribed

NODES = {"a": 3, "b": 2, "c": 1}
# Open-ended bookings reach here, beyond all others.
HORIZON = 60

nodes = st.sampled_from(sorted(NODES))
millis = st.sampled_from((1, 400, 500, 600, 1000))
delays = st.integers(-3, 12)
terms = st.sampled_from((1, 2, 3, 5, 8, 20, None))


@dataclass(frozen=True)
class Promise:
    node_id: str
    gpus: tuple[int, ...]
    milli: int
    start: int
    end: int

    @property
    def until(self):
        return None if self.end == HORIZON else self.end

    def covers(self, instant):
        return self.start <= instant < self.end


def used(promises, node_id, gpu, instant):
    return sum(
        p.milli for p in promises if p.node_id == node_id and gpu in p.gpus and p.covers(instant)
    )


def claims(promises, node_id, instant):
    here = [p for p in promises if p.node_id == node_id]
    fixed = {gpu for p in here for gpu in p.gpus if p.end > instant}
    return len(fixed) + sum(p.covers(instant) for p in here if not p.gpus)


def allowed(promises, node_id, since):
    gpus = range(NODES[node_id])
    return all(
        claims(promises, node_id, instant) <= len(gpus)
        and all(used(promises, node_id, gpu, instant) <= 1000 for gpu in gpus)
        for instant in range(since, HORIZON + 1)
    )


class CalendarMachine(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.calendar = fresh_calendar()
        self.promises = {}
        self.now = 5
        self.expired = 0
        self.count = 0

    def with_promise(self, promise):
        return allowed([*self.promises.values(), promise], promise.node_id, self.expired)

    def interval(self, delay, term):
        start = self.now + delay
        end = HORIZON if term is None else start + term
        return start, max(end, self.expired + 1)

    def room_at(self, node_id, gpu, start, end):
        instants = range(max(start, self.expired), end)
        return 1000 - max(used(self.promises.values(), node_id, gpu, t) for t in instants)

    @rule(node_id=nodes, data=st.data(), milli=millis, delay=delays, term=terms)
    def book(self, node_id, data, milli, delay, term):
        indices = st.integers(0, NODES[node_id] - 1)
        gpus = tuple(data.draw(st.lists(indices, min_size=1, unique=True)))
        self.count += 1
        promise = Promise(node_id, gpus, milli, *self.interval(delay, term))
        span = (promise.start, promise.until)
        conflicts = self.calendar.conflicts(node_id, gpus, milli, *span)
        room = self.calendar.room(node_id, *span)
        try:
            self.calendar.book(f"x{self.count}", node_id, gpus, milli, *span)
        except Oversubscribed as refused:
            assert not self.with_promise(promise)
            assert refused.gpu in gpus
            assert conflicts
            assert any(room[gpu] < milli for gpu in gpus)
            rest = {k: p for k, p in self.promises.items() if k not in conflicts}
            first = allowed([*rest.values(), promise], node_id, refused.at)
            assert first or refused.at < HORIZON
        else:
            assert self.with_promise(promise)
            assert conflicts == ()
            self.promises[f"x{self.count}"] = promise

    @rule(node_id=nodes, delay=delays, term=terms)
    def book_any(self, node_id, delay, term):
        self.count += 1
        promise = Promise(node_id, (), 1000, *self.interval(delay, term))
        waits = self.with_promise(promise) and NODES[node_id] > 1
        fixed = [replace(promise, gpus=(gpu,)) for gpu in range(NODES[node_id])]
        span = (promise.start, promise.until)
        assert self.calendar.any_room(node_id, *span) == (
            waits or any(map(self.with_promise, fixed))
        )
        try:
            gpu = self.calendar.book_any(f"x{self.count}", node_id, *span)
        except Oversubscribed:
            assert not waits
            assert not any(map(self.with_promise, fixed))
            return
        assert (gpu is None) == waits
        kept = promise if gpu is None else fixed[gpu]
        assert self.with_promise(kept)
        self.promises[f"x{self.count}"] = kept

    @precondition(lambda self: self.promises)
    @rule(data=st.data(), more=st.one_of(st.integers(0, 10), st.none()))
    def extend(self, data, more):
        booking_id = data.draw(st.sampled_from(sorted(self.promises)))
        promise = self.promises[booking_id]
        end = HORIZON if more is None else min(HORIZON, promise.end + more)
        longer = replace(promise, end=end)
        others = [p for key, p in self.promises.items() if key != booking_id]
        fits = allowed([*others, longer], promise.node_id, self.expired)
        try:
            self.calendar.extend(booking_id, longer.until)
        except Oversubscribed:
            assert not fits
        else:
            assert fits
            self.promises[booking_id] = longer

    @precondition(lambda self: self.promises)
    @rule(data=st.data(), at=st.integers(-10, 15))
    def cut(self, data, at):
        booking_id = data.draw(st.sampled_from(sorted(self.promises)))
        promise = self.promises[booking_id]
        end = min(promise.end, self.now + at)
        self.calendar.cut(booking_id, self.now + at)
        self.promises[booking_id] = replace(promise, end=end)
        if end <= max(promise.start, self.expired):
            del self.promises[booking_id]

    @rule(steps=st.integers(0, 4), expire=st.booleans())
    def time_passes(self, steps, expire):
        self.now += steps
        if expire:
            self.calendar.expire(self.now)
            self.expired = self.now
            self.promises = {k: p for k, p in self.promises.items() if p.end > self.now}

    @rule()
    def bind_what_starts(self):
        waiting = [(p.start, k) for k, p in self.promises.items() if not p.gpus]
        for start, booking_id in sorted(waiting):
            if start > self.now:
                break
            gpu = self.calendar.bind(booking_id)
            promise = self.promises[booking_id]
            assert self.calendar.bind(booking_id) == gpu
            assert self.room_at(promise.node_id, gpu, promise.start, promise.end) == 1000
            self.promises[booking_id] = replace(promise, gpus=(gpu,))

    @rule(node_id=nodes, count=st.integers(1, 3), milli=millis, delay=delays, term=terms)
    def pick(self, node_id, count, milli, delay, term):
        start, end = self.interval(delay, term)
        span = (start, None if end == HORIZON else end)
        picked = self.calendar.pick(node_id, count, milli, *span)
        single = [
            gpu
            for gpu in range(NODES[node_id])
            if self.with_promise(Promise(node_id, (gpu,), milli, start, end))
        ]
        room = self.calendar.room(node_id, *span)
        if picked is None:
            assert count > 1 or not single
            assert sum(milli <= free for free in room) < count
            return
        assert len(set(picked)) == count
        assert set(picked) <= set(single)
        assert self.with_promise(Promise(node_id, picked, milli, start, end))
        assert self.calendar.best_node([node_id], count, milli, *span) == node_id

    @rule(node_id=nodes, delay=delays, term=terms, data=st.data())
    def all_room_can_be_had(self, node_id, delay, term, data):
        start, end = self.interval(delay, term)
        room = self.calendar.room(node_id, start, None if end == HORIZON else end)
        shown = [gpu for gpu, milli in enumerate(room) if milli]
        taken = data.draw(st.permutations(shown))
        promises = [Promise(node_id, (gpu,), room[gpu], start, end) for gpu in taken]
        assert allowed([*self.promises.values(), *promises], node_id, self.expired)
        for gpu in range(NODES[node_id]):
            hidden = self.room_at(node_id, gpu, start, end) if gpu not in shown else 0
            assert room[gpu] in (0, self.room_at(node_id, gpu, start, end))
            if hidden:
                one_more = Promise(node_id, (gpu,), 1, start, end)
                assert not allowed(
                    [*self.promises.values(), *promises, one_more], node_id, self.expired
                )

    @rule(node_id=nodes, count=st.integers(1, 3), milli=millis, term=st.integers(1, 8))
    def earliest(self, node_id, count, milli, term):
        first = self.calendar.earliest(node_id, count, milli, term, self.now)

        def fits(start):
            return self.calendar.best_node([node_id], count, milli, start, start + term) is not None

        starts = range(self.now, HORIZON)
        assert first == next((start for start in starts if fits(start)), None)

    @rule(seed=st.integers(0, 100))
    def restart(self, seed):
        """Bookings can be made again in any order, whatever happened before."""
        self.calendar = fresh_calendar()
        if seed % 2:
            self.calendar.expire(self.expired)
        else:
            self.expired = 0
        entries = list(self.promises.items())
        random.Random(seed).shuffle(entries)
        for booking_id, p in entries:
            if p.gpus:
                self.calendar.book(booking_id, p.node_id, p.gpus, p.milli, p.start, p.until)
            else:
                assert self.calendar.book_any(booking_id, p.node_id, p.start, p.until) is None

    @invariant()
    def rule_holds(self):
        for node_id, gpu_count in NODES.items():
            assert allowed(list(self.promises.values()), node_id, self.expired)
            for gpu in range(gpu_count):
                free = self.calendar._nodes[node_id].gpus[gpu]
                for instant in range(self.expired, HORIZON):
                    expected = used(self.promises.values(), node_id, gpu, instant)
                    assert free.highest(instant, instant + 1) == expected


def fresh_calendar():
    calendar = Calendar()
    for node_id, gpu_count in NODES.items():
        calendar.set_node(node_id, gpu_count)
    return calendar


CalendarMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)
TestCalendar = CalendarMachine.TestCase
