"""What will be asked of a pool soon: what was asked at this time on other days. Pure.

Seasonal-naive, over ten-minute buckets: the same bucket of the last days, the same weekday counting
twice. It is used for two things. An idle pool is kept for longer where requests usually follow each
other fast enough to make that worth it, and for less long where they do not (ski rental with
predictions; Purohit et al., 2018: with a trust of 1/4 at most 5 times the cost of knowing the
future, if the forecast is all wrong). A pool that sleeps is woken ahead where that is worth more
than it costs: whoever would have waited for the start, against the time that its GPUs stand idle
until the first one comes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from market.autoscaling import PLACES_USED, WAITING_HOUR_PICO, Costs

BUCKET_S = 600
DAY = 86_400 // BUCKET_S
DAYS = 14
# With fewer days on record nothing is said.
DAYS_LEAST = 2
SAME_WEEKDAY = 2.0
# Kept for so many times as long as without a forecast, where requests come at least at so much of
# the rate that makes keeping worth it; and where they do not.
LONGER = 4.0
SHORTER = 0.5
ENOUGH = 0.7
# What a start ahead must save for what it costs: a forecast is often wrong.
MARGIN = 2.0
# After so many times the usual while until the first request, it is not coming.
PATIENCE = 3.0
STAYS_S = 120.0
# Where GPUs cost nothing, likely is enough.
LIKELY = 0.5


@dataclass(frozen=True, slots=True)
class Bucket:
    """Requests that came in ten minutes, and for how many seconds in all they were under way."""

    requests: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class Expected:
    """Of a bucket: how likely anybody comes; if so, how many and how many at a time."""

    chance: float = 0.0
    requests: float = 0.0
    load: float = 0.0

    @property
    def first_s(self) -> float:
        """When the first one comes, if any does, in seconds from the bucket's begin."""
        return BUCKET_S / (self.requests + 1)


NOTHING = Expected()


@dataclass(frozen=True, slots=True)
class History:
    """A pool's buckets, numbered from the epoch on; those without requests are left out.

    ``since``: the first one on record.
    """

    since: int
    buckets: Mapping[int, Bucket]

    def knows(self, bucket: int) -> bool:
        """Whether enough days are on record to say anything."""
        return bucket - DAYS_LEAST * DAY >= self.since

    def expect(self, bucket: int) -> Expected:
        """What is usual at the bucket's time of day."""
        if not self.knows(bucket):
            return NOTHING
        days = [day for day in range(1, DAYS + 1) if bucket - day * DAY >= self.since]
        weights = {day: SAME_WEEKDAY if day % 7 == 0 else 1.0 for day in days}
        there = {
            day: self.buckets[bucket - day * DAY]
            for day in days
            if bucket - day * DAY in self.buckets
        }
        weight = sum(weights[day] for day in there)
        if not weight:
            return NOTHING
        requests = sum(weights[day] * found.requests for day, found in there.items()) / weight
        busy_s = sum(weights[day] * found.busy_s for day, found in there.items()) / weight
        return Expected(weight / sum(weights.values()), requests, busy_s / BUCKET_S)


def is_worth_it(expected: Expected, costs: Costs) -> bool:
    """Whether a start ahead of the first request saves more than it costs."""
    if not expected.chance:
        return False
    if costs.hour_pico == 0:
        return expected.chance >= LIKELY
    start_s = costs.start_s if costs.wake_s is None else costs.wake_s
    rate = expected.requests / BUCKET_S
    waited_s = start_s * (1 + rate * start_s / 2)  # by all who come until it has started
    idle_s = expected.chance * expected.first_s + (1 - expected.chance) * _patience_s(expected)
    saved = expected.chance * waited_s * WAITING_HOUR_PICO
    return saved >= MARGIN * idle_s * costs.hour_pico


def stretch(history: History, now_s: float, keep_alive_s: float) -> float:
    """By how much an idle pool's keep-alive is to be longer or shorter; 1 if nobody knows.

    ``now_s`` is since the epoch; ``keep_alive_s`` that of the break-even.
    """
    bucket = int(now_s // BUCKET_S)
    if not history.knows(bucket):
        return 1.0
    soon = history.expect(bucket), history.expect(bucket + 1)
    rate = max(expected.chance * expected.requests for expected in soon) / BUCKET_S
    return LONGER if rate * keep_alive_s >= ENOUGH else SHORTER


def replicas_ahead(
    history: History, now_s: float, idle_s: float, costs: Costs, places: int, *, is_there: bool
) -> int:
    """How many replicas should be there by ``now_s`` (since the epoch) plus the time of a start.

    One that ``is_there`` does not go shortly before it is expected back. ``idle_s``: for how long
    nobody has asked. 0 if nothing is expected, or it did not come.
    """
    start_s = costs.start_s if costs.wake_s is None else costs.wake_s
    leads_s = (start_s, max(start_s, STAYS_S)) if is_there else (start_s,)
    buckets = {int((now_s + lead_s) // BUCKET_S) for lead_s in leads_s}
    return max(_in_bucket(history, bucket, now_s, idle_s, costs, places) for bucket in buckets)


def _in_bucket(  # what replicas_ahead has, of one bucket
    history: History, bucket: int, now_s: float, idle_s: float, costs: Costs, places: int
) -> int:
    expected = history.expect(bucket)
    if not is_worth_it(expected, costs):
        return 0
    waited_s = min(idle_s, now_s - bucket * BUCKET_S)
    if waited_s > _patience_s(expected):
        return 0
    return max(1, math.ceil(expected.load / (places * PLACES_USED)))


def _patience_s(expected: Expected) -> float:
    return min(BUCKET_S, PATIENCE * expected.first_s)
