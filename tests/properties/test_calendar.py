"""Random bookings against the calendar's rule, looked up instant by instant in a plain list."""

import itertools
import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from market.calendar import Calendar, Oversubscribed

NODES = {"a": 3, "b": 1}
# Open-ended bookings reach here, beyond all others.
HORIZON = 36
LAST_NOW = 18

nodes = st.sampled_from(sorted(NODES))
millis = st.sampled_from((400, 600, 1000))
delays = st.integers(-2, 8)
terms = st.sampled_from((1, 2, 3, 5, 8, None))


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


def keeps_rule(promises, node_id, instant):
    return claims(promises, node_id, instant) <= NODES[node_id]


def allowed(promises, node_id, since):
    return all(
        keeps_rule(promises, node_id, instant)
        and all(used(promises, node_id, gpu, instant) <= 1000 for gpu in range(NODES[node_id]))
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
        fits = self.with_promise(promise)
        assert fits == (conflicts == ())
        if fits:
            self.calendar.book(f"x{self.count}", node_id, gpus, milli, *span)
            self.promises[f"x{self.count}"] = promise
            return
        assert any(room[gpu] < milli for gpu in gpus)
        with pytest.raises(Oversubscribed) as refused:
            self.calendar.book(f"x{self.count}", node_id, gpus, milli, *span)
        tried = [*self.promises.values(), promise]
        instants = range(self.expired, HORIZON + 1)
        full = [(g, t) for g in gpus for t in instants if used(tried, node_id, g, t) > 1000]
        needed = [(g, t) for t in instants if not keeps_rule(tried, node_id, t) for g in gpus]
        where = (refused.value.gpu, refused.value.at)
        assert where == full[0] if full else where in needed[: len(gpus)]
        without = [p for key, p in self.promises.items() if key not in conflicts]
        assert not any(used([*without, promise], node_id, *spot) > 1000 for spot in full)
        assert not needed or keeps_rule([*without, promise], node_id, needed[0][1])

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

    @rule(steps=st.integers(0, 3), expire=st.booleans())
    def time_passes(self, steps, expire):
        self.now = min(self.now + steps, LAST_NOW)
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
    def ask(self, node_id, count, milli, delay, term):
        start, end = self.interval(delay, term)
        span = (start, None if end == HORIZON else end)
        self.check_room(node_id, start, end, self.calendar.room(node_id, *span))
        picked = self.calendar.pick(node_id, count, milli, *span)
        combinations = itertools.combinations(range(NODES[node_id]), count)
        possible = [
            gpus
            for gpus in combinations
            if self.with_promise(Promise(node_id, gpus, milli, start, end))
        ]
        assert picked in possible if possible else picked is None
        waits = (count, milli) == (1, 1000) and self.calendar.any_room(node_id, *span)
        fits = bool(possible) or waits
        assert self.calendar.best_node([node_id], count, milli, *span) == (
            node_id if fits else None
        )

    def check_room(self, node_id, start, end, room):
        shown = [gpu for gpu, milli in enumerate(room) if milli]
        promises = [Promise(node_id, (gpu,), room[gpu], start, end) for gpu in shown]
        together = [*self.promises.values(), *promises]
        assert allowed(together, node_id, self.expired)
        for gpu in range(NODES[node_id]):
            free = self.room_at(node_id, gpu, start, end)
            assert room[gpu] in (0, free)
            if free and not room[gpu]:
                one_more = Promise(node_id, (gpu,), 1, start, end)
                assert not allowed([*together, one_more], node_id, self.expired)

    @rule(node_id=nodes, count=st.integers(1, 2), milli=millis, term=st.integers(1, 8))
    def ask_for_the_first_start(self, node_id, count, milli, term):
        def fits(start):
            return self.calendar.best_node([node_id], count, milli, start, start + term) is not None

        first = self.calendar.earliest(node_id, count, milli, term, self.now)
        assert first == next(filter(fits, range(self.now, HORIZON)), None)

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
    def profiles_have_no_needless_steps(self):
        for node in self.calendar._nodes.values():
            for profile in (*node.gpus, node.load, node.claims):
                assert all(a != b for a, b in itertools.pairwise(profile.values))

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
