"""Which lane and model: spilling, thresholds, the cheapest that is fast enough."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from market import routing
from market.routing import Difficulties, Load, Option, Query, Reason
from market.types import Budget, Lane, LanePolicy, Period, Rule
from tests.samples import CARD, ROUTE

IDLE = Load(0, 0, 16)
FULL = Load(16, 4, 16, finished_per_s=2.0, ttft_s=0.1)
LEASE = replace(ROUTE, lane=Lane.LEASE, lease_id="lease-1", app_name="own")


class TestLoad:
    def test_expects_what_the_last_ones_had_while_there_is_room(self):
        assert replace(IDLE, ttft_s=0.3).first_token_s == 0.3

    def test_expects_its_turn_where_others_wait(self):
        assert FULL.first_token_s == pytest.approx(5 / 2 + 0.1)

    def test_nobody_knows_before_anybody_has_ended(self):
        assert replace(FULL, finished_per_s=0.0).first_token_s == math.inf


class TestSpill:
    def test_lease_comes_first(self):
        assert routing.spill_reason(IDLE, 2.0) is None

    def test_what_would_come_too_late_spills(self):
        assert routing.spill_reason(FULL, 2.0) is Reason.TTFT
        assert routing.spill_reason(FULL, 3.0) is None

    def test_slow_first_tokens_spill_though_there_is_room(self):
        busy = Load(40, 0, 128, finished_per_s=1.0, ttft_s=30.0)
        assert routing.spill_reason(busy, 2.0) is Reason.TTFT
        assert routing.spill_reason(replace(busy, ttft_s=1.9), 2.0) is None

    def test_a_queue_longer_than_the_lease_spills(self):
        assert routing.spill_reason(replace(FULL, waiting=17), 100.0) is Reason.QUEUE

    def test_no_replica_spills(self):
        assert routing.spill_reason(None, 2.0) is Reason.NOT_READY


class TestWithSpill:
    RULE = Rule("tiny", "acme", "lease-1", LanePolicy(2.0, spill_pico=7), lease_id="lease-1")

    def test_the_lease_and_else_the_pool_within_its_cap(self):
        choice = routing.with_spill(self.RULE, LEASE, ROUTE, None)
        assert (choice.route, choice.reason, choice.cap) == (LEASE, Reason.OWN, None)
        assert choice.otherwise.reason is Reason.FALLBACK
        assert choice.otherwise.cap == Budget("spill:lease-1", Period.DAY, 7)

    def test_without_a_budget_they_are_counted_too(self):
        rule = replace(self.RULE, policy=LanePolicy(2.0))
        cap = routing.with_spill(rule, None, ROUTE, Reason.TTFT).cap
        assert (cap.subject, cap.period, cap.limit_pico) == ("spill:lease-1", Period.DAY, 10**27)

    def test_the_pool_for_a_reason_and_else_the_lease(self):
        choice = routing.with_spill(self.RULE, LEASE, ROUTE, Reason.TTFT)
        assert (choice.route, choice.reason) == (ROUTE, Reason.TTFT)
        assert choice.otherwise.route == LEASE

    def test_whichever_there_is(self):
        assert routing.with_spill(self.RULE, None, ROUTE, Reason.NOT_READY).otherwise is None
        assert routing.with_spill(self.RULE, LEASE, None, Reason.QUEUE).route == LEASE
        assert routing.with_spill(self.RULE, None, None, Reason.NOT_READY) is None


class TestThreshold:
    @given(
        st.lists(st.floats(0, 1), min_size=50, max_size=300, unique=True),
        st.floats(0, 1),
    )
    def test_the_strong_model_gets_its_share(self, scores, share):
        known = Difficulties(list(scores))
        limit = known.threshold(share, [0.5])
        hard = sum(score > limit for score in scores)
        assert hard == pytest.approx(share * len(scores), abs=1)

    def test_usual_requests_count_as_long_as_there_are_few(self):
        usual = [0.1 * n for n in range(1, 11)]
        assert Difficulties([0.99] * 49).threshold(0.5, usual) == pytest.approx(0.5)
        assert Difficulties([0.99] * 50).threshold(0.5, usual) == 0.99

    def test_the_oldest_is_forgotten(self):
        known = Difficulties()
        for number in range(routing.REMEMBERED + 10):
            known.add(number / 10_000)
        assert len(known.scores) == routing.REMEMBERED
        assert min(known.scores) == 10 / 10_000

    @given(st.floats(0.01, 1.0), st.integers(1, 100))
    def test_cost_meets_the_target_where_it_can(self, target, factor):
        strong = replace(CARD, input_pico=factor * 1000, output_pico=factor * 1000)
        cheap = replace(CARD, input_pico=1000, output_pico=1000)
        share = routing.strong_share(cheap, strong, target)
        assert 0 <= share <= 1
        cost = share + (1 - share) / factor
        assert cost == pytest.approx(max(target, 1 / factor))

    @pytest.mark.parametrize("pico", [0, 1000])
    def test_a_strong_model_that_costs_nothing_gets_all(self, pico):
        cheap, strong = (replace(CARD, input_pico=each, output_pico=each) for each in (pico, 0))
        assert routing.strong_share(cheap, strong, 0.5) == 1.0

    def test_what_only_the_strong_one_can(self):
        assert routing.needs_strong(Query("x", 10, tools=True), 1000) is Reason.TOOLS
        assert routing.needs_strong(Query("x", 751), 1000) is Reason.LONG
        assert routing.needs_strong(Query("x", 750), 1000) is None


class TestCheapest:
    def test_own_lease_costs_nothing_more(self):
        own, pool = Option(LEASE, CARD, IDLE), Option(ROUTE, CARD, IDLE)
        assert routing.cheapest([pool, own], 2.0) == (own, Reason.OWN)

    def test_too_slow_a_lease_is_passed_over(self):
        own, pool = Option(LEASE, CARD, FULL), Option(ROUTE, CARD, IDLE)
        assert routing.cheapest([own, pool], 2.0) == (pool, Reason.CHEAPEST)

    def test_the_cheaper_pool(self):
        dear = Option(replace(ROUTE, app_name="dear"), replace(CARD, output_pico=10**9), IDLE)
        cheap = Option(ROUTE, CARD, IDLE)
        assert routing.cheapest([dear, cheap], 2.0) == (cheap, Reason.CHEAPEST)

    def test_the_fastest_where_none_is_fast_enough(self):
        slow, slower = (
            Option(ROUTE, CARD, FULL),
            Option(LEASE, CARD, replace(FULL, waiting=9)),
        )
        assert routing.cheapest([slower, slow], 0.5) == (slow, Reason.FASTEST)

    def test_nothing_to_choose_from(self):
        with pytest.raises(ValueError, match="empty"):
            routing.cheapest([], 1.0)
