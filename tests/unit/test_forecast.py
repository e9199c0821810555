"""What is usual at a time of day, and when it is worth a start ahead."""

from dataclasses import replace

import pytest

from market.autoscaling import Costs
from market.forecast import (
    BUCKET_S,
    DAY,
    LONGER,
    NOTHING,
    SHORTER,
    Bucket,
    Expected,
    History,
    is_worth_it,
    replicas_ahead,
    stretch,
)

HOUR_PICO = 2 * 10**12
COSTS = Costs(HOUR_PICO, start_s=20.0)
TODAY = 20_000 * DAY
NINE = 54  # buckets after midnight
BUSY = Bucket(60, 1200.0)


def days(*numbers, since=14, slot=NINE, bucket=BUSY):
    """So many days ago there were requests at nine; the record begins ``since`` days ago."""
    return History(TODAY - since * DAY, {TODAY + slot - day * DAY: bucket for day in numbers})


class TestExpect:
    def test_every_day_at_nine(self):
        found = days(*range(1, 15)).expect(TODAY + NINE)
        assert (found.chance, found.requests, found.load) == (1.0, 60, 2.0)
        assert days(*range(1, 15)).expect(TODAY + NINE + 1) == Expected(0.0)

    def test_the_same_weekday_counts_twice(self):
        assert days(7, since=7).expect(TODAY + NINE).chance == pytest.approx(2 / 8)
        assert days(1, since=7).expect(TODAY + NINE).chance == pytest.approx(1 / 8)

    def test_one_day_is_no_history(self):
        assert days(1, since=1).expect(TODAY + NINE) == NOTHING
        assert days(1, 2, since=2).expect(TODAY + NINE).chance == 1

    def test_days_before_the_record_are_not_days_without_requests(self):
        assert days(1, 2, 3, since=3).expect(TODAY + NINE).chance == 1


class TestWorth:
    def test_many_who_would_wait(self):
        assert is_worth_it(Expected(1.0, requests=40, load=1), COSTS)

    def test_one_that_comes_some_time_is_not_worth_ten_minutes_of_a_gpu(self):
        assert not is_worth_it(Expected(1.0, requests=1, load=0.1), COSTS)

    def test_unlikely_ones_are_not(self):
        assert not is_worth_it(Expected(0.1, requests=20, load=1), COSTS)
        assert not is_worth_it(NOTHING, COSTS)

    def test_slow_starts_and_cheap_gpus_are_sooner(self):
        rare = Expected(1.0, requests=3, load=0.1)
        assert not is_worth_it(rare, COSTS)
        assert is_worth_it(rare, replace(COSTS, start_s=90.0))
        assert is_worth_it(rare, replace(COSTS, hour_pico=HOUR_PICO // 10))

    def test_one_that_sleeps_wakes_so_fast_that_it_may_sleep_on(self):
        likely = Expected(1.0, requests=20, load=1)
        assert not is_worth_it(likely, replace(COSTS, wake_s=1.0))

    def test_where_gpus_cost_nothing_likely_is_enough(self):
        free = replace(COSTS, hour_pico=0)
        assert is_worth_it(Expected(0.6, requests=1, load=0), free)
        assert not is_worth_it(Expected(0.4, requests=99, load=0), free)


class TestStretch:
    NINE_S = (TODAY + NINE) * BUCKET_S

    def test_longer_where_requests_follow_each_other_and_shorter_where_not(self):
        known = days(*range(1, 15))  # one every ten seconds
        assert stretch(known, self.NINE_S, 120.0) == LONGER
        assert stretch(known, self.NINE_S - BUCKET_S, 120.0) == LONGER  # soon
        assert stretch(known, self.NINE_S + BUCKET_S, 120.0) == SHORTER
        rare = days(*range(1, 15), bucket=Bucket(2, 20.0))
        assert stretch(rare, self.NINE_S, 120.0) == SHORTER
        assert stretch(rare, self.NINE_S, 600.0) == LONGER

    def test_not_at_all_without_days_on_record(self):
        assert stretch(days(1, since=1), self.NINE_S, 120.0) == 1.0


class TestAhead:
    NINE_S = (TODAY + NINE) * BUCKET_S

    def ahead(self, seconds, history=None, idle_s=3600.0, is_there=False, **costs):
        known, now_s = history or days(*range(1, 15)), self.NINE_S + seconds
        priced = replace(COSTS, **costs)
        return replicas_ahead(known, now_s, idle_s, priced, 10, is_there=is_there)

    def test_begins_as_long_before_as_a_start_takes(self):
        assert [self.ahead(s) for s in (-21, -19, 0)] == [0, 1, 1]
        assert self.ahead(-39, start_s=40.0) == 1

    def test_one_that_is_there_stays_for_what_comes_soon(self):
        assert [self.ahead(s, is_there=True) for s in (-130, -100, -21)] == [0, 1, 1]

    def test_one_that_is_there_does_not_go_while_its_own_bucket_lasts(self):
        """Though nothing is usual in the next one."""
        for seconds in (490, 570, 579):
            assert self.ahead(seconds, is_there=True, idle_s=1.0) == 1
            assert self.ahead(seconds, is_there=False, idle_s=1.0) == 1

    def test_is_over_with_the_bucket(self):
        assert self.ahead(BUCKET_S - 15) == 0

    def test_is_given_up_if_nobody_comes(self):
        assert self.ahead(25) == 1
        assert self.ahead(60) == 0
        assert self.ahead(60, idle_s=5.0) == 1  # somebody came

    def test_as_many_as_are_usually_under_way(self):
        crowd = days(*range(1, 15), bucket=Bucket(600, 25 * BUCKET_S))
        assert self.ahead(0, crowd) == 4  # 25 at a time, of 10 places four fifths

    def test_nothing_at_other_times(self):
        assert self.ahead(7200) == 0
