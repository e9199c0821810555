"""Lease life: one transition table, and what time does to a lease. Pure.

A lease is charged for the time in which its replica was seen healthy, in segments cut from it; the
rest of ``[start, end)`` is credited. Money is held ahead of time, an hour at once, so that no
segment can fail to be paid.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from market import pricing
from market.errors import Conflict, MarketFault
from market.types import TERM_MAX_S, CloseReason, Lease, LeaseState

SEGMENT = timedelta(seconds=60)
CREDIT_SEGMENT = timedelta(hours=1)
HOLD = timedelta(hours=1)
HOLD_AHEAD = timedelta(minutes=10)
GRACE = timedelta(minutes=5)
NOTICE = timedelta(minutes=30)
DRAIN = timedelta(seconds=120)
STOP_AHEAD = timedelta(seconds=15)
# A replica's death is noticed this late at most: time so short before it was last seen healthy is
# not charged. A node that fell silent is noticed later.
DETECTION = timedelta(seconds=5)
NODE_DETECTION = timedelta(seconds=30)
RENEW_AHEAD_MAX = timedelta(days=56)
RENEW_UNTIL = timedelta(hours=1)
MICRO = timedelta(microseconds=1)


class Event(StrEnum):
    """What can happen to a lease."""

    READY = "ready"
    RENEW = "renew"
    EXPIRE = "expire"
    RELEASE = "release"
    RUN_DRY = "run_dry"
    LOSE_NODE = "lose_node"
    LEAVE = "leave"
    FAIL = "fail"


_ENDS = {
    Event.EXPIRE: LeaseState.CLOSED,
    Event.RELEASE: LeaseState.CLOSED,
    Event.RUN_DRY: LeaseState.CLOSED,
    Event.LOSE_NODE: LeaseState.CLOSED,
    Event.LEAVE: LeaseState.CLOSED,
    Event.FAIL: LeaseState.CLOSED,
}

# Everything that can happen to a lease is in this table; what is not in it is a bug.
TRANSITIONS: dict[LeaseState, dict[Event, LeaseState]] = {
    LeaseState.PENDING: {
        Event.READY: LeaseState.ACTIVE,
        Event.RENEW: LeaseState.PENDING,
        **_ENDS,
    },
    LeaseState.ACTIVE: {
        Event.READY: LeaseState.ACTIVE,
        Event.RENEW: LeaseState.ACTIVE,
        **_ENDS,
    },
    LeaseState.CLOSED: {},
}

CLOSE_REASONS = {
    Event.EXPIRE: CloseReason.EXPIRED,
    Event.RELEASE: CloseReason.RELEASED,
    Event.RUN_DRY: CloseReason.OUT_OF_FUNDS,
    Event.LOSE_NODE: CloseReason.NODE_LOST,
    Event.LEAVE: CloseReason.NODE_LEFT,
    Event.FAIL: CloseReason.FAILED,
}


class IllegalTransition(MarketFault):
    """An event that the lease's state does not know: a bug in the caller."""


def step(lease: Lease, event: Event, now: datetime, reason: str) -> Lease:
    """The lease after an event. Raises IllegalTransition; the lease given is never changed."""
    state = TRANSITIONS[lease.state].get(event)
    if state is None:
        raise IllegalTransition(f"lease {lease.lease_id} is {lease.state}: {event} is impossible")
    if state is LeaseState.CLOSED:
        return replace(
            lease,
            state=state,
            reason=reason,
            close_reason=CLOSE_REASONS[event],
            closed_at=now,
            end=min(lease.end, max(now, lease.start)),
            run_replica=None,
            run_since=None,
        )
    activated_at = lease.activated_at
    if state is LeaseState.ACTIVE and activated_at is None:
        activated_at = now
    return replace(lease, state=state, reason=reason, activated_at=activated_at)


def is_over(lease: Lease) -> bool:
    """Whether nothing more happens to a lease: closed, and its last hold has ended."""
    return lease.state is LeaseState.CLOSED and lease.ended_index == lease.hold_index


# -- what is due when ----------------------------------------------------------------------


def drains_from(lease: Lease) -> datetime:
    """From when on no new request is sent to it: the last two minutes, less of a short term."""
    return lease.end - min(DRAIN, (lease.end - lease.start) / 10)


def stops_at(lease: Lease) -> datetime:
    """When its replica begins to end, so that the GPU is free at the lease's end."""
    return lease.end - min(STOP_AHEAD, (lease.end - lease.start) / 20)


def noticed_from(lease: Lease) -> datetime:
    """When the holder is told that the end is near."""
    return lease.end - min(NOTICE, (lease.end - lease.start) / 4)


def due(lease: Lease, now: datetime) -> Event | None:
    """What time alone does to an open lease."""
    if lease.state is LeaseState.CLOSED:
        return None
    if now >= lease.end:
        return Event.EXPIRE
    if now >= lease.covered_until + GRACE and lease.covered_until < lease.end:
        return Event.RUN_DRY
    return None


def renewed_end(lease: Lease, term: timedelta, now: datetime) -> datetime:
    """The end of the lease ``term`` later. Raises Conflict outside the window for renewals.

    Renewals are taken from 56 days to one hour before the end (a quarter of the term if that is
    less), up to 182 days ahead: the terms of AWS Capacity Blocks.
    """
    last = lease.end - min(RENEW_UNTIL, (lease.end - lease.start) / 4)
    end = lease.end + term
    if lease.state is LeaseState.CLOSED:
        raise Conflict(f"lease {lease.lease_id} is closed ({lease.close_reason}); order a new one")
    if now > last:
        raise Conflict(
            f"lease {lease.lease_id} ends at {_clock(lease.end)}; it could be renewed until "
            f"{_clock(last)}; order a new one"
        )
    if now < lease.end - RENEW_AHEAD_MAX:
        raise Conflict(
            f"lease {lease.lease_id} can be renewed from {_clock(lease.end - RENEW_AHEAD_MAX)} on"
        )
    if end - now > timedelta(seconds=TERM_MAX_S):
        raise Conflict(f"a lease can reach at most {TERM_MAX_S // 86_400} days ahead")
    return end


def _clock(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


# -- money ahead of time -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HoldPlan:
    """The next hold of a lease: it pays for the time from ``start``, at most until ``end``."""

    index: int
    start: datetime
    end: datetime
    wanted_pico: int
    minimum_pico: int


def next_hold(lease: Lease, now: datetime) -> HoldPlan | None:
    """The hold to open now, None if enough is held. Never a third one beside two open ones."""
    if lease.state is LeaseState.CLOSED or lease.covered_until >= lease.end:
        return None
    if lease.hold_index >= 0 and now < lease.covered_until - HOLD_AHEAD:
        return None
    if lease.hold_index - lease.ended_index > 1:
        return None
    start = lease.covered_until
    end = min(lease.end, max(start, now) + HOLD)
    least = min(end, max(start, now) + SEGMENT)
    return HoldPlan(
        index=lease.hold_index + 1,
        start=start,
        end=end,
        wanted_pico=_ceiling(lease, end - start),
        minimum_pico=_ceiling(lease, least - start),
    )


def with_hold(lease: Lease, plan: HoldPlan, granted_pico: int) -> Lease:
    """The lease once ``plan`` was granted, wholly or for as long as the money lasts."""
    end = plan.end
    if granted_pico < plan.wanted_pico:
        gpu_us = pricing.gpu_affordable(granted_pico, lease.gpu_hour_pico)
        end = min(end, plan.start + gpu_us * 1000 // lease.total_milli * MICRO)
    return replace(lease, hold_index=plan.index, hold_from=plan.start, covered_until=end)


def finished_hold(lease: Lease) -> int | None:
    """The oldest open hold if everything it pays for has been metered."""
    oldest = lease.ended_index + 1
    if oldest > lease.hold_index:
        return None
    if lease.state is LeaseState.CLOSED:
        return oldest
    passed = oldest < lease.hold_index and lease.metered_until >= lease.hold_from
    return oldest if passed else None


def total_ceiling(lease: Lease) -> int:
    """The most the whole term can cost, in pico units."""
    return _ceiling(lease, lease.end - lease.start)


def _ceiling(lease: Lease, time: timedelta) -> int:
    gpu_us = -(-(time // MICRO) * lease.total_milli // 1000)
    return pricing.gpu_ceiling(gpu_us, lease.gpu_hour_pico)


# -- metering ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a lease's time: charged if healthy, else credited with ``reason``."""

    start: datetime
    end: datetime
    hold_index: int
    gpu_us: int
    charge_pico: int
    credited_us: int
    reason: str


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen of a lease's replica: ``run`` identifies the process that serves, if any.

    ``last`` is when ``lease.run_replica`` was seen before; None if that is not known any more.
    ``at`` is when this was seen, if not just now: nothing later is charged on its word.
    """

    run: str | None
    last: datetime | None
    node_lost: bool = False
    at: datetime | None = None


def meter(lease: Lease, now: datetime, sight: Sight) -> tuple[Lease, list[Segment]]:
    """Decide the time that can be decided: the lease after it, and its segments.

    Time is healthy while the same run is seen at both ends of it, also over a restart of the
    scheduler. Segments are cut from it when a minute is full or the run ends; what was not covered
    by held money when it ended is credited.
    """
    now = min(now, lease.end)
    segments: list[Segment] = []
    if now <= lease.metered_until:
        return _run(lease, sight.run, now), segments
    if lease.run_replica is not None and lease.run_replica == sight.run:
        # A node that fell silent still looks healthy for a while: so short a time can wait.
        return _charge(lease, now - NODE_DETECTION, segments, whole=True)
    if lease.run_replica is not None:
        lag = NODE_DETECTION if sight.node_lost else DETECTION
        known = lease.metered_until if sight.last is None else sight.last - lag
        lease, segments = _charge(lease, known, segments, whole=False)
        lease = replace(lease, run_replica=None, run_since=None)
    if sight.run is not None:
        lease, segments = _credit(lease, now, segments, _why(lease))
        return _run(lease, sight.run, now), segments
    full = lease.metered_until + CREDIT_SEGMENT
    if now >= full:
        return _credit(lease, full, segments, _why(lease))
    return lease, segments


def meter_to_end(lease: Lease, now: datetime, sight: Sight) -> tuple[Lease, list[Segment]]:
    """Decide everything until ``now`` or the lease's end: it is about to be closed."""
    now = min(now, lease.end)
    segments: list[Segment] = []
    if lease.run_replica is not None and lease.run_replica == sight.run:
        seen_until = now if sight.at is None else min(now, sight.at)
        lease, segments = _charge(lease, seen_until, segments, whole=False)
    elif lease.run_replica is not None:
        lease, segments = meter(lease, now, sight)
    return _credit(lease, now, segments, _why(lease))


def _why(lease: Lease) -> str:
    if lease.metered_until >= lease.covered_until:
        return "the balance was out: not charged"
    return "no healthy replica"


def _run(lease: Lease, run: str | None, now: datetime) -> Lease:
    if run == lease.run_replica:
        return lease
    return replace(lease, run_replica=run, run_since=None if run is None else now)


def _charge(
    lease: Lease, until: datetime, segments: list[Segment], whole: bool
) -> tuple[Lease, list[Segment]]:
    """Charge up to ``until``, as far as money is held; only full segments if ``whole``."""
    until = min(until, lease.end, lease.covered_until)
    made = list(segments)
    while lease.metered_until < until:
        full = lease.metered_until + SEGMENT
        border = _border(lease, full)
        if whole and until < border:
            break
        end = min(until, border)
        healthy_us = lease.healthy_us + (end - lease.metered_until) // MICRO
        gpu_us = healthy_us * lease.total_milli // 1000 - lease.gpu_us
        charge_pico = pricing.gpu_charge(lease.gpu_us, gpu_us, lease.gpu_hour_pico)
        hold = _hold_at(lease, lease.metered_until)
        made.append(Segment(lease.metered_until, end, hold, gpu_us, charge_pico, 0, ""))
        lease = replace(
            lease,
            metered_until=end,
            healthy_us=healthy_us,
            gpu_us=lease.gpu_us + gpu_us,
            charged_pico=lease.charged_pico + charge_pico,
        )
    return lease, made


def _credit(
    lease: Lease, until: datetime, segments: list[Segment], reason: str
) -> tuple[Lease, list[Segment]]:
    """Put on record that the time up to ``until`` is not charged."""
    made = list(segments)
    while lease.metered_until < until:
        end = min(until, _border(lease, lease.metered_until + CREDIT_SEGMENT))
        lost_us = (end - lease.metered_until) // MICRO
        hold = _hold_at(lease, lease.metered_until)
        made.append(Segment(lease.metered_until, end, hold, 0, 0, lost_us, reason))
        lease = replace(lease, metered_until=end, credited_us=lease.credited_us + lost_us)
    return lease, made


def _border(lease: Lease, end: datetime) -> datetime:
    """``end``, or the change of holds if that comes first: a segment draws on one hold."""
    return lease.hold_from if lease.metered_until < lease.hold_from < end else end


def _hold_at(lease: Lease, moment: datetime) -> int:
    """The hold that pays for a moment."""
    return lease.hold_index if moment >= lease.hold_from else max(0, lease.hold_index - 1)
