from dataclasses import replace
from datetime import timedelta

import pytest

from market import leases
from market.errors import Conflict
from market.leases import Event, IllegalTransition, Sight, meter, meter_to_end, next_hold, with_hold
from market.types import CloseReason, LeaseState
from tests.samples import GPU_HOUR_PICO, NOON, lease

DAY_S = 86_400
HOUR_S = 3_600
SECOND_PICO = GPU_HOUR_PICO // HOUR_S
ENDS = {
    Event.EXPIRE: CloseReason.EXPIRED,
    Event.RELEASE: CloseReason.RELEASED,
    Event.RUN_DRY: CloseReason.OUT_OF_FUNDS,
    Event.LOSE_NODE: CloseReason.NODE_LOST,
    Event.LEAVE: CloseReason.NODE_LEFT,
    Event.FAIL: CloseReason.FAILED,
}
ILL = "no healthy replica"
DRY = "the balance was out: not charged"


def at(second):
    return NOON + timedelta(seconds=second)


def held(own, now=NOON, granted_pico=None):
    plan = next_hold(own, now)
    return with_hold(own, plan, plan.wanted_pico if granted_pico is None else granted_pico)


def watch(own, *looks, last=None):
    """The lease after looks (second, run), as the scheduler's loop takes them; its segments."""
    made = []
    for second, run in looks:
        own, segments = meter(own, at(second), Sight(run, last))
        made += segments
        if run is not None and own.run_replica == run:
            last = at(second)
    return own, made


def brief(segments):
    """(from second, to second, why not charged) of each."""
    return [
        ((s.start - NOON).total_seconds(), (s.end - NOON).total_seconds(), s.reason)
        for s in segments
    ]


def minutes(first_s, last_s):
    return [(float(s), float(s + 60), "") for s in range(first_s, last_s, 60)]


class TestTable:
    OPEN = (LeaseState.PENDING, LeaseState.ACTIVE)

    @pytest.mark.parametrize("state", OPEN)
    def test_ready_makes_it_active_and_notes_when_it_was_so_first(self, state):
        own = leases.step(lease(state=state), Event.READY, at(5), "serving")
        assert (own.state, own.reason, own.activated_at) == (LeaseState.ACTIVE, "serving", at(5))
        assert leases.step(own, Event.READY, at(9), "serving").activated_at == at(5)

    @pytest.mark.parametrize("state", OPEN)
    def test_renewal_keeps_the_state(self, state):
        before = lease(state=state, activated_at=at(1) if state is LeaseState.ACTIVE else None)
        assert leases.step(before, Event.RENEW, at(5), "r") == replace(before, reason="r")

    @pytest.mark.parametrize("event", ENDS)
    @pytest.mark.parametrize("state", OPEN)
    def test_every_end_closes_it_with_its_reason(self, state, event):
        own = leases.step(
            lease(state=state, run_replica="a", run_since=NOON), event, at(100), "why"
        )
        assert (own.state, own.close_reason, own.reason) == (LeaseState.CLOSED, ENDS[event], "why")
        assert (own.closed_at, own.end) == (at(100), at(100))
        assert (own.run_replica, own.run_since) == (None, None)

    @pytest.mark.parametrize("event", Event)
    def test_nothing_happens_to_a_closed_one(self, event):
        own = leases.step(lease(), Event.RELEASE, at(5), "released")
        before = replace(own)
        with pytest.raises(IllegalTransition, match=f"lease-1 is closed: {event} is impossible"):
            leases.step(own, event, at(6), "again")
        assert own == before

    def test_every_state_and_event_is_in_these_tests(self):
        assert set(leases.TRANSITIONS) == {*self.OPEN, LeaseState.CLOSED}
        for state in self.OPEN:
            assert set(leases.TRANSITIONS[state]) == {Event.READY, Event.RENEW, *ENDS} == {*Event}

    def test_end_of_one_closed_late_or_before_its_start(self):
        late = leases.step(lease(term_s=60), Event.EXPIRE, at(100), "over")
        assert (late.end, late.closed_at) == (at(60), at(100))
        early = leases.step(lease(start=at(500)), Event.RELEASE, at(100), "released")
        assert (early.start, early.end, early.closed_at) == (at(500), at(500), at(100))

    def test_is_over_once_closed_and_its_last_hold_has_ended(self):
        own = held(lease())
        closed = leases.step(own, Event.RELEASE, at(5), "released")
        assert not leases.is_over(replace(own, ended_index=0))
        assert not leases.is_over(closed)
        assert leases.is_over(replace(closed, ended_index=0))


class TestDue:
    @pytest.mark.parametrize(
        ("second", "event"),
        [(0, None), (899, None), (900, Event.RUN_DRY), (DAY_S, Event.EXPIRE)],
    )
    def test_out_of_funds_after_the_grace_expired_at_the_end(self, second, event):
        assert leases.due(lease(covered_until=at(600)), at(second)) is event

    @pytest.mark.parametrize("second", [659, 660, 2000])
    def test_all_of_it_paid_can_only_expire(self, second):
        own = held(lease(term_s=660))
        assert leases.due(own, at(second)) is (None if second < 660 else Event.EXPIRE)

    def test_grace_of_one_that_starts_later_begins_with_its_time(self):
        own = held(lease(start=at(DAY_S)))
        assert leases.due(own, at(DAY_S + HOUR_S + 299)) is None
        assert leases.due(own, at(DAY_S + HOUR_S + 300)) is Event.RUN_DRY

    def test_closed_one_has_nothing_due(self):
        assert leases.due(lease(state=LeaseState.CLOSED), at(2 * DAY_S)) is None

    @pytest.mark.parametrize(
        ("term_s", "notice_s", "drain_s", "stop_s"),
        [
            (30 * DAY_S, 1800, 120, 15),
            (2 * HOUR_S, 1800, 120, 15),
            (HOUR_S, 900, 120, 15),
            (1200, 300, 120, 15),
            (300, 75, 30, 15),
            (60, 15, 6, 3),
            (10, 2.5, 1, 0.5),
        ],
    )
    def test_notice_drain_and_stop_leave_most_of_a_short_term(
        self, term_s, notice_s, drain_s, stop_s
    ):
        own = lease(term_s=term_s)
        assert own.end - leases.noticed_from(own) == timedelta(seconds=notice_s)
        assert own.end - leases.drains_from(own) == timedelta(seconds=drain_s)
        assert own.end - leases.stops_at(own) == timedelta(seconds=stop_s)


class TestRenewal:
    TERM = timedelta(days=1)

    @pytest.mark.parametrize(
        ("term_s", "last_s"), [(DAY_S, DAY_S - HOUR_S), (2 * HOUR_S, 1.5 * HOUR_S), (60, 45)]
    )
    def test_until_an_hour_before_the_end_or_a_quarter_of_the_term(self, term_s, last_s):
        own = lease(term_s=term_s)
        assert leases.renewed_end(own, self.TERM, at(last_s)) == own.end + self.TERM
        with pytest.raises(Conflict, match=r"could be renewed until .* UTC; order a new one"):
            leases.renewed_end(own, self.TERM, at(last_s + 1e-6))

    def test_from_56_days_before_the_end(self):
        own = lease(term_s=100 * DAY_S)
        assert leases.renewed_end(own, self.TERM, at(44 * DAY_S)) == own.end + self.TERM
        with pytest.raises(Conflict, match="can be renewed from 2026-12-15 12:00:00 UTC on"):
            leases.renewed_end(own, self.TERM, at(44 * DAY_S - 1))

    def test_to_182_days_ahead(self):
        own = lease(term_s=50 * DAY_S)
        assert leases.renewed_end(own, timedelta(days=132), NOON) == at(182 * DAY_S)
        with pytest.raises(Conflict, match="at most 182 days ahead"):
            leases.renewed_end(own, timedelta(days=132, seconds=1), NOON)

    def test_closed_one_says_why_it_cannot(self):
        closed = leases.step(lease(), Event.RELEASE, at(5), "released")
        with pytest.raises(Conflict, match=r"lease-1 is closed \(released\); order a new one"):
            leases.renewed_end(closed, self.TERM, at(6))

    def test_what_was_paid_to_the_end_is_paid_on(self):
        own = held(lease(term_s=600))
        assert next_hold(own, at(300)) is None
        plan = next_hold(replace(own, end=at(1000)), at(300))
        assert (plan.index, plan.start, plan.end) == (1, at(600), at(1000))


class TestHolds:
    @pytest.mark.parametrize(
        ("term_s", "wanted_s", "minimum_s"),
        [(DAY_S, HOUR_S, 60), (HOUR_S, HOUR_S, 60), (600, 600, 60), (10, 10, 10)],
    )
    def test_first_is_an_hour_or_the_term(self, term_s, wanted_s, minimum_s):
        plan = next_hold(lease(term_s=term_s), NOON)
        assert (plan.index, plan.start, plan.end) == (0, NOON, at(wanted_s))
        assert plan.wanted_pico == wanted_s * SECOND_PICO
        assert plan.minimum_pico == minimum_s * SECOND_PICO

    def test_next_one_is_opened_ten_minutes_ahead(self):
        own = held(lease())
        assert next_hold(own, at(2999)) is None
        plan = next_hold(own, at(3000))
        assert (plan.index, plan.start, plan.end) == (1, at(HOUR_S), at(2 * HOUR_S))
        assert plan.minimum_pico == 60 * SECOND_PICO
        assert with_hold(own, plan, plan.wanted_pico).covered_until == at(2 * HOUR_S)

    def test_last_one_ends_with_the_lease(self):
        own = held(held(lease(term_s=5000)), at(3000))
        assert own.covered_until == own.end == at(5000)
        assert next_hold(replace(own, ended_index=0), at(4999)) is None

    def test_one_for_a_later_start_is_of_its_first_hour(self):
        own = held(lease(start=at(DAY_S)))
        assert (own.hold_from, own.covered_until) == (at(DAY_S), at(DAY_S + HOUR_S))
        assert next_hold(own, NOON) is None

    def test_late_one_pays_from_where_the_money_ended_and_a_whole_hour_from_now(self):
        plan = next_hold(held(lease()), at(HOUR_S + 100))
        assert (plan.start, plan.end) == (at(HOUR_S), at(2 * HOUR_S + 100))
        assert plan.minimum_pico == 160 * SECOND_PICO

    @pytest.mark.parametrize("milli", [1, 333, 999, 1000])
    @pytest.mark.parametrize("price_pico", [1, GPU_HOUR_PICO, 2_123_456_789_012])
    def test_part_of_it_covers_what_it_can_pay_to_the_microsecond(self, milli, price_pico):
        own = lease(gpu_milli=milli, gpu_hour_pico=price_pico)
        plan = next_hold(own, NOON)
        granted_pico = plan.wanted_pico * 2 // 3
        covered_us = (with_hold(own, plan, granted_pico).covered_until - NOON) // leases.MICRO

        def most_pico(time_us):
            gpu_us = -(-time_us * milli // 1000)
            return -(-gpu_us * price_pico // (HOUR_S * 10**6))

        assert plan.wanted_pico == most_pico(HOUR_S * 10**6)
        assert most_pico(covered_us) <= granted_pico < most_pico(covered_us + 1)

    def test_free_one_holds_nothing_and_covers_all_the_same(self):
        plan = next_hold(lease(gpu_hour_pico=0), NOON)
        assert (plan.wanted_pico, plan.minimum_pico) == (0, 0)
        assert with_hold(lease(gpu_hour_pico=0), plan, 0).covered_until == at(HOUR_S)

    def test_there_are_never_three(self):
        own = held(held(lease()), at(3000))
        assert next_hold(own, at(2 * HOUR_S)) is None
        assert next_hold(replace(own, ended_index=0), at(2 * HOUR_S)).index == 2

    def test_none_is_opened_for_a_closed_one(self):
        assert next_hold(leases.step(lease(), Event.RELEASE, NOON, "released"), NOON) is None

    def test_they_end_in_order_once_metered_and_the_last_with_the_lease(self):
        one = held(lease())
        assert leases.finished_hold(lease()) is leases.finished_hold(one) is None
        both = held(one, at(3000))
        assert leases.finished_hold(replace(both, metered_until=at(3599))) is None
        passed = replace(both, metered_until=at(3600))
        assert leases.finished_hold(passed) == 0
        assert leases.finished_hold(replace(passed, ended_index=0)) is None
        closed = leases.step(both, Event.RELEASE, at(3100), "released")
        ended = [leases.finished_hold(replace(closed, ended_index=index)) for index in (-1, 0, 1)]
        assert ended == [0, 1, None]


class TestMetering:
    def test_minute_is_charged_when_it_is_full_and_the_run_was_seen_after_it(self):
        own, made = watch(held(lease()), (0, "a"), (60, "a"))
        assert made == []
        own, made = watch(own, (95, "a"), last=at(60))
        assert brief(made) == [(0, 60, "")]
        assert (made[0].charge_pico, made[0].gpu_us) == (60 * SECOND_PICO, 60_000_000)
        assert (own.metered_until, own.charged_pico) == (at(60), 60 * SECOND_PICO)

    def test_time_before_it_was_healthy_is_credited(self):
        own, made = watch(held(lease()), (0, None), (90, None), (100, "a"), (195, "a"))
        assert brief(made) == [(0, 100, ILL), (100, 160, "")]
        assert (own.run_replica, own.run_since) == ("a", at(100))
        assert (own.credited_us, own.healthy_us) == (100_000_000, 60_000_000)

    def test_without_any_replica_it_is_credited_by_the_hour(self):
        own, made = watch(held(held(lease()), at(3000)), (3599, None), (3600, None), (7199, None))
        assert brief(made) == [(0, 3600, ILL)]
        assert own.metered_until == at(3600)

    def test_replica_replaced_is_charged_until_shortly_before_it_was_seen_last(self):
        own, made = watch(held(lease()), (0, "a"), (30, "a"), (31, "b"), (91, "b"), (125, "b"))
        assert brief(made) == [(0, 25, ""), (25, 31, ILL), (31, 91, "")]
        assert own.run_replica == "b"

    def test_replica_that_is_gone_for_a_moment_is_another_one(self):
        _, made = watch(held(lease()), (0, "a"), (30, "a"), (31, None), (40, "a"))
        assert brief(made) == [(0, 25, ""), (25, 40, ILL)]

    def test_lost_node_was_seen_healthy_for_longer_than_it_was(self):
        own, _ = watch(held(lease()), (0, "a"), (50, "a"))
        own, made = meter(own, at(51), Sight(None, at(50), node_lost=True))
        assert brief(made) == [(0, 20, "")]
        assert own.run_replica is None

    def test_nothing_is_charged_that_a_lost_node_would_undo(self):

        own, made = watch(held(lease()), (0, "a"), (65, "a"))
        own, more = meter(own, at(66), Sight(None, at(65), node_lost=True))
        assert brief(made + more) == [(0, 35, "")]

    def test_restart_of_the_scheduler_with_the_same_run_loses_nothing(self):
        own, _ = watch(held(lease()), (0, "a"), (30, "a"))
        own, made = watch(own, (1000, "a"), last=None)
        assert brief(made) == minutes(0, 960)

    @pytest.mark.parametrize("run", ["b", None])
    def test_restart_with_another_run_or_none_charges_only_what_was_decided(self, run):
        own, made = watch(held(lease()), (0, "a"), (65, "a"), (100, "a"))
        own, more = watch(own, (1000, run), last=None)
        own, rest = meter_to_end(own, at(1010), Sight(run, None))
        credited = [(60, 1000, ILL)] if run else []
        assert brief(made + more) == [(0, 60, ""), *credited]
        assert brief(rest) == ([(1000, 1010, "")] if run else [(60, 1010, ILL)])

    def test_segments_are_cut_where_one_hold_follows_another(self):
        own = held(held(lease(), granted_pico=90 * SECOND_PICO), at(60))
        _, made = watch(own, (0, "a"), (200, "a"))
        assert brief(made) == [(0, 60, ""), (60, 90, ""), (90, 150, "")]
        assert [segment.hold_index for segment in made] == [0, 0, 1]

    def test_credited_time_is_cut_there_too(self):
        own = held(held(lease(), granted_pico=90 * SECOND_PICO), at(60))
        _, made = watch(own, (200, "a"))
        assert [(s.hold_index, *brief([s])[0]) for s in made] == [
            (0, 0, 90, ILL),
            (1, 90, 200, ILL),
        ]

    def test_time_that_no_money_covered_is_charged_when_it_comes(self):
        own, _ = watch(held(lease(), granted_pico=90 * SECOND_PICO), (0, "a"), (300, "a"))
        assert own.metered_until == at(60)
        _, made = watch(held(own, at(300)), (301, "a"))
        assert brief(made) == [(60, 90, ""), *[(s, s + 60, "") for s in (90, 150, 210)]]
        assert [segment.hold_index for segment in made] == [0, 1, 1, 1]

    def test_else_it_is_credited(self):
        own, _ = watch(held(lease(), granted_pico=90 * SECOND_PICO), (0, "a"), (300, "a"))
        _, made = meter_to_end(own, at(390), Sight("a", at(300)))
        assert brief(made) == [(60, 90, ""), (90, 390, DRY)]

    def test_share_of_a_gpu_at_an_odd_price_costs_the_floor(self):
        own = lease(gpu_milli=333, gpu_hour_pico=2_123_456_789_012, end=at(95))
        own, made = watch(held(own), (0, "a"), (34.000001, "a"), (35, "b"), (94, "b"))
        own, rest = meter_to_end(own, at(95), Sight("b", at(94)))
        healthy_us = 29_000_001 + 60_000_000
        gpu_us = healthy_us * 333 // 1000
        assert (own.healthy_us, own.gpu_us) == (healthy_us, gpu_us)
        assert own.charged_pico == gpu_us * 2_123_456_789_012 // 3_600_000_000
        assert sum(s.charge_pico for s in made + rest) == own.charged_pico

    def test_several_gpus_cost_as_many_times_as_much(self):
        own, made = watch(held(lease(gpu_count=3)), (0, "a"), (95, "a"))
        assert (made[0].gpu_us, made[0].charge_pico) == (180_000_000, 180 * SECOND_PICO)
        assert own.healthy_us == 60_000_000

    def test_replica_seen_before_the_start_counts_from_the_start(self):
        own = held(lease(start=at(1000)))
        own, made = watch(own, (990, "a"), (1030, "a"), (1095, "a"))
        assert brief(made) == [(1000, 1060, "")]

    def test_replica_seen_after_the_end_served_until_then(self):
        own, _ = watch(held(lease(term_s=100)), (0, "a"))
        own, made = meter_to_end(own, at(150), Sight("a", at(0)))
        assert brief(made) == [(0, 60, ""), (60, 100, "")]
        assert meter(own, at(200), Sight("a", at(150)))[1] == []

    @pytest.mark.parametrize("event", ENDS)
    def test_closing_decides_all_time_until_then(self, event):
        own, made = watch(held(lease()), (0, "a"), (30, "a"), (31, None))
        own, rest = meter_to_end(own, at(500), Sight(None, at(30)))
        closed = leases.step(own, event, at(500), "why")
        assert brief(made + rest) == [(0, 25, ""), (25, 500, ILL)]
        assert closed.metered_until == closed.end == at(500)

    def test_closing_before_the_start_meters_nothing(self):
        own = held(lease(start=at(1000)))
        assert meter_to_end(own, at(10), Sight(None, None)) == (own, [])

    def test_clock_that_goes_back_meters_nothing_twice(self):
        own, _ = watch(held(lease()), (0, "a"), (155, "a"))
        own, made = watch(own, (70, "a"), (124, "a"), (215, "a"), last=at(155))
        assert brief(made) == [(120, 180, "")]
