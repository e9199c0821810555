from dataclasses import replace
from datetime import timedelta
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from market import catalog
from market.calendar import Calendar
from market.matching import Match, Misfit, indices, match, micros, place_pool, positions
from market.pricing import parse_money
from market.types import Gpu, OfferState, Place
from tests.samples import NOON, OFFER, ORDER

QWEN = catalog.find("qwen-7b")
TINY = catalog.find("tiny-qwen")
HOUR_US = 3_600 * 10**6
NOW_US = micros(NOON)


def at(hours):
    return NOON + timedelta(hours=hours)


def offer(name="server", ask="3.6", domains=(0, 0), **changes):
    """An offer with one GPU per domain given."""
    gpus = tuple(Gpu(i, "a10", 24_564, domain) for i, domain in enumerate(domains))
    named = {"offer_id": name, "node_id": name, "ask_pico": parse_money(ask), "gpus": gpus}
    return replace(OFFER, **(named | changes))


def calendar_of(*offers, **taken):
    """A calendar of these nodes; ``taken``: per node (GPU, milli, from hour, to hour or None)."""
    calendar = Calendar()
    for own in offers:
        calendar.set_node(own.node_id, len(own.gpus))
    for node_id, bookings in taken.items():
        for number, (gpu, milli, start, end) in enumerate(bookings):
            until = None if end is None else NOW_US + int(end * HOUR_US)
            calendar.book(
                f"{node_id}-{number}", node_id, (gpu,), milli, NOW_US + int(start * HOUR_US), until
            )
    return calendar


def found(order, *offers, model=QWEN, calendar=None):
    return match(order, model, offers, calendar or calendar_of(*offers), NOON)


def why(order, *offers, model=QWEN, calendar=None):
    misfit = found(order, *offers, model=model, calendar=calendar)
    assert isinstance(misfit, Misfit)
    return misfit


class TestWhere:
    def test_it_starts_now_on_a_certain_gpu_for_the_whole_term(self):
        got = found(ORDER, offer())
        assert got == Match(ORDER, offer(), Place("server", "server", (0,), 1000), NOON, at(24))

    def test_cheapest_wins(self):
        offers = [offer("a", "2.50"), offer("b", "2.499999"), offer("c", "3")]
        calendar = calendar_of(*offers, a=[(0, 500, 0, 99)])
        for some in permutations(offers):
            assert found(ORDER, *some, calendar=calendar).offer.offer_id == "b"

    def test_next_cheapest_if_that_is_full_at_any_time_of_the_term(self):
        offers = [offer("a", "1", (0,)), offer("b", "2", (0,)), offer("c", "3", (0,))]
        calendar = calendar_of(*offers, a=[(0, 1, 0, 1)], b=[(0, 1, 23.9, 30)])
        assert found(ORDER, *offers, calendar=calendar).offer.offer_id == "c"

    def test_among_equal_prices_the_one_that_leaves_the_fewest_fragments(self):
        offers = [offer("a"), offer("b"), offer("c")]
        calendar = calendar_of(*offers, b=[(1, 1000, 0, 99)])
        for some in permutations(offers):
            assert found(ORDER, *some, calendar=calendar).offer.offer_id == "b"

    def test_then_the_lowest_id(self):
        offers = [offer("b"), offer("c"), offer("a")]
        for some in permutations(offers):
            assert found(ORDER, *some).place == Place("a", "a", (0,), 1000)

    def test_share_goes_to_the_gpu_that_it_fills(self):
        own = offer(domains=(0, 0, 0))
        calendar = calendar_of(own, server=[(0, 200, 0, 99), (2, 250, 0, 99)])
        order = replace(ORDER, gpu_milli=750)
        assert found(order, own, calendar=calendar).place == Place("server", "server", (2,), 750)

    def test_several_gpus_come_from_one_domain(self):
        own = offer(domains=(0, 1, 0, 1))
        calendar = calendar_of(own, server=[(0, 1000, 0, 99)])
        order = replace(ORDER, gpu_count=2)
        assert found(order, own, calendar=calendar).place.gpu_indices == (1, 3)

    def test_if_no_domain_has_so_many_they_come_from_two(self):
        order = replace(ORDER, gpu_count=3)
        assert len(found(order, offer(domains=(0, 0, 1, 1))).place.gpu_indices) == 3

    def test_indices_are_those_of_the_driver(self):
        own = offer(gpus=(Gpu(4, "a10", 24_564), Gpu(7, "a10", 24_564)))
        calendar = calendar_of(own, server=[(0, 1000, 0, 99)])
        assert found(ORDER, own, calendar=calendar).place.gpu_indices == (7,)
        assert (indices(own, [1, 0]), positions(own, [4, 7])) == ((7, 4), (0, 1))
        with pytest.raises(KeyError):
            positions(own, [5])

    def test_enough_memory_in_all_is_enough(self):
        order, big = replace(ORDER, gpu_count=2), catalog.find("qwen-14b")
        assert found(order, offer(), model=big).place.gpu_indices == (0, 1)

    def test_node_that_has_the_model_comes_first_at_the_same_price(self):
        offers = [offer("a", "1"), offer("b", "1"), offer("dear", "2")]
        calendar, order = calendar_of(*offers), replace(ORDER, start=None)

        def chosen(**on_disk):
            return match(order, QWEN, offers, calendar, NOON, on_disk=on_disk).offer.offer_id

        first = chosen()
        other = "b" if first == "a" else "a"
        assert chosen(**{other: {QWEN.name}}) == other
        assert chosen(**{other: {"something-else"}}) == first
        assert chosen(dear={QWEN.name}) == first

    def test_full_node_that_has_the_model_keeps_nobody_from_the_others(self):
        offers = [offer("a", "1"), offer("b", "1")]
        full = [(gpu.index, 1000, 0, None) for gpu in offers[0].gpus]
        calendar = calendar_of(*offers, a=full)
        order = replace(ORDER, start=None)
        got = match(order, QWEN, offers, calendar, NOON, on_disk={"a": {QWEN.name}})
        assert got.offer.offer_id == "b"


class TestWhen:
    def test_start_that_has_passed_is_now(self):
        got = found(replace(ORDER, start=at(-0.01)), offer())
        assert (got.start, got.end, got.place.gpu_indices) == (NOON, at(24), (0,))

    def test_which_gpu_of_a_node_is_decided_at_a_later_start(self):
        got = found(replace(ORDER, start=at(2)), offer("a"), offer("b", "3"))
        assert got.place == Place("b", "b", (), 1000)
        assert (got.start, got.end) == (at(2), at(26))

    @pytest.mark.parametrize("shape", [(2, 1000), (1, 500)])
    def test_but_not_of_a_share_or_of_several(self, shape):
        count, milli = shape
        order = replace(ORDER, start=at(2), gpu_count=count, gpu_milli=milli)
        assert len(found(order, offer(), model=TINY).place.gpu_indices) == count

    def test_later_one_goes_where_the_least_time_is_wasted(self):
        offers = [offer("a"), offer("b"), offer("c")]
        calendar = calendar_of(*offers, a=[(0, 1000, 0, 0.5)], b=[(0, 1000, 0, 2)])
        order = replace(ORDER, start=at(2))
        assert found(order, *offers, calendar=calendar).place.node_id == "b"

    def test_what_waits_for_any_gpu_is_in_the_way_of_what_starts_now(self):
        own = offer()
        calendar = calendar_of(own)
        for number in range(2):
            assert calendar.book_any(f"w{number}", "server", NOW_US + HOUR_US, None) is None
        assert why(ORDER, own, calendar=calendar).earliest is None
        short = replace(ORDER, term_s=3_600)
        assert isinstance(found(short, own, calendar=calendar), Match)


REASONS = [
    ({"state": OfferState.DRAINING, "reason": "no new orders"}, {}, "is draining (no new orders)"),
    ({"state": OfferState.LOST}, {}, "is lost"),
    ({"gpus": ()}, {}, "has no GPU"),
    ({}, {"provider_id": "hub"}, "is of another provider than hub"),
    ({"region": "eu"}, {"region": "us"}, "is in region eu, not us"),
    ({}, {"gpu_type": "h100"}, "has a10, not h100"),
    ({}, {"gpu_memory_mib": 24_576}, "has GPUs of 23 GiB, not 24"),
    ({}, {"gpu_count": 3}, "has only 2 GPU(s)"),
    (
        {},
        {"gpu_milli": 500},
        "is too small: qwen-7b needs 17 GiB, 0.5 of a GPU of a10 has 11",
    ),
    ({"logical": True}, {}, "has logical GPUs only, and qwen-7b does not run on CPUs"),
    ({}, {"max_price_pico": parse_money("3.59")}, "asks 3.6 per GPU-hour"),
    ({"term_min_s": 86_401}, {}, "takes terms of 86401 s to 182 d"),
    ({"term_min_s": 60, "term_max_s": 7_200}, {}, "takes terms of 60 s to 2 h"),
    ({"available_from": at(1)}, {}, "is available from 2026-11-01 13:00:00 UTC on"),
    ({"available_until": at(23)}, {}, "is available until 2026-11-02 11:00:00 UTC"),
]
FITS = [
    ({}, {"provider_id": "local", "region": "local", "gpu_type": "a10"}),
    ({}, {"gpu_memory_mib": 24_564}),
    ({}, {"gpu_milli": 706}),
    ({}, {"max_price_pico": parse_money("3.6")}),
    ({"term_min_s": 86_400, "term_max_s": 86_400}, {}),
    ({"available_from": NOON, "available_until": at(24)}, {}),
]


class TestReasons:
    @pytest.mark.parametrize(("offered", "ordered", "reason"), REASONS)
    def test_every_rule_says_what_is_in_the_way(self, offered, ordered, reason):
        own, order = replace(offer(), **offered), replace(ORDER, **ordered)
        text = why(order, own).reason
        assert text.startswith("no offer has room for ")
        assert text.partition(": server ")[2].partition("; it would fit")[0] == reason

    @pytest.mark.parametrize(("offered", "ordered"), FITS)
    def test_what_just_keeps_a_rule_fits(self, offered, ordered):
        assert isinstance(found(replace(ORDER, **ordered), replace(offer(), **offered)), Match)

    def test_logical_gpus_do_for_small_models(self):
        assert isinstance(found(ORDER, offer(logical=True), model=TINY), Match)

    def test_all_offers_are_named_those_with_one_reason_together(self):
        offers = [offer("c", state=OfferState.LOST), offer("a", "9"), offer("b", "9")]
        cheap = replace(ORDER, max_price_pico=parse_money("1"))
        assert why(cheap, *offers).reason == (
            "no offer has room for 1 GPU(s): a, b each asks 9 per GPU-hour; c is lost"
        )

    def test_nobody_offers_anything(self):
        assert why(ORDER).reason.startswith("nobody offers GPUs here")

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({}, "has at most 0.3 of a GPU free for the whole term"),
            ({"gpu_milli": 750}, "has at most 0.3 of a GPU free for the whole term"),
            ({"gpu_count": 2}, "has 0 of 2 GPUs free for the whole term"),
        ],
    )
    def test_what_is_free_of_a_full_one(self, changes, reason):
        calendar = calendar_of(offer(), server=[(0, 1000, 0, None), (1, 700, 5, None)])
        assert reason in why(replace(ORDER, **changes), offer(), calendar=calendar).reason


def has_room(calendar, offers, shape, start, end):
    """Whether the calendar would book it on any of them."""
    if shape == (1, 1000):
        return any(calendar.any_room(own.node_id, start, end) for own in offers)
    return any(calendar.pick(own.node_id, *shape, start, end) for own in offers)


class TestEarliest:
    def test_first_moment_at_which_some_offer_has_room_for_the_whole_term(self):
        offers = [offer("a", domains=(0,)), offer("b", "9", (0,))]
        calendar = calendar_of(
            *offers, a=[(0, 1000, 0, 40)], b=[(0, 1000, 0, 3), (0, 1000, 20, 30)]
        )
        misfit = why(ORDER, *offers, calendar=calendar)
        assert misfit.earliest == at(30)
        assert misfit.reason.endswith("; it would fit from 2026-11-02 18:00:00 UTC on")
        got = found(replace(ORDER, start=at(30)), *offers, calendar=calendar)
        assert (got.offer.offer_id, got.start) == ("b", at(30))

    def test_none_if_it_never_fits_or_no_longer(self):
        full = calendar_of(offer(), server=[(0, 1000, 0, None), (1, 1000, 0, None)])
        assert why(ORDER, offer(), calendar=full).earliest is None
        own = offer(domains=(0,), available_until=at(25))
        late = calendar_of(own, server=[(0, 1000, 0, 1.5)])
        assert why(ORDER, own, calendar=late).earliest is None
        soon = calendar_of(own, server=[(0, 1000, 0, 1)])
        assert why(ORDER, own, calendar=soon).earliest == at(1)

    def test_an_offer_that_is_not_available_yet_will_be(self):

        own = offer(available_from=at(1))
        assert why(ORDER, own).earliest == at(1)

    @given(
        taken=st.lists(
            st.tuples(
                st.sampled_from("abc"),
                st.integers(0, 2),
                st.sampled_from([100, 500, 1000]),
                st.integers(0, 40),
                st.integers(1, 30),
            ),
            max_size=12,
        ),
        waiting=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), max_size=4),
        shape=st.sampled_from([(1, 1000), (2, 1000), (3, 1000), (1, 500), (1, 900)]),
        start=st.sampled_from([None, 0, 5, 17]),
    )
    @settings(max_examples=200, deadline=None)
    def test_what_is_found_can_be_booked_and_is_the_cheapest(self, taken, waiting, shape, start):
        offers = [offer("a", "2", (0,) * 3), offer("b", "1", (0, 0, 1)), offer("c", "2", (0,) * 3)]
        calendar = calendar_of(*offers)
        for number, (node_id, gpu, milli, first, hours) in enumerate(taken):
            begin = NOW_US + first * HOUR_US
            if calendar.room(node_id, begin, begin + hours * HOUR_US)[gpu] >= milli:
                until = begin + hours * HOUR_US
                calendar.book(f"t{number}", node_id, (gpu,), milli, begin, until)
        for number, (node_id, first) in enumerate(waiting):
            begin = NOW_US + first * HOUR_US
            if calendar.any_room(node_id, begin, begin + 9 * HOUR_US):
                calendar.book_any(f"w{number}", node_id, begin, begin + 9 * HOUR_US)
        count, milli = shape
        order = replace(ORDER, gpu_count=count, gpu_milli=milli)
        order = replace(order, start=None if start is None else at(start))
        got = match(order, TINY, offers, calendar, NOON)
        if isinstance(got, Misfit):
            begin = micros(order.start or NOON)
            assert not has_room(calendar, offers, shape, begin, begin + 24 * HOUR_US)
            if got.earliest is None:
                return
            assert got.earliest > (order.start or NOON)
            order = replace(order, start=got.earliest)
            got = match(order, TINY, offers, calendar, NOON)
        assert isinstance(got, Match)
        span = (micros(got.start), micros(got.end))
        cheaper = [other for other in offers if other.ask_pico < got.offer.ask_pico]
        assert not has_room(calendar, cheaper, shape, *span)
        if got.place.gpu_indices:
            calendar.book("new", got.place.node_id, got.place.gpu_indices, milli, *span)
        else:
            calendar.book_any("new", got.place.node_id, *span)


class TestPool:
    LAPTOP = offer("laptop", "0", (), memory_mib=4_000)

    def places(self, model, replicas, *offers, calendar=None, cpu=None, disks=None, memory=None):
        calendar = calendar or calendar_of(*offers)
        free = {o.offer_id: calendar.room(o.node_id, micros(NOON), None) for o in offers}
        stored = disks or {}, memory or {}
        return place_pool(model, replicas, offers, free, cpu or {}, NOON, *stored)

    def test_share_follows_from_memory(self):
        assert self.places(QWEN, 1, offer()) == (Place("server", "server", (0,), 706),)

    def test_each_replica_takes_its_share(self):
        one, two = self.places(QWEN, 2, offer())
        assert {one.gpu_indices, two.gpu_indices} == {(0,), (1,)}
        assert len(self.places(TINY, 1000 // 42, offer(domains=(0,)))) == 23
        assert isinstance(self.places(TINY, 24, offer(domains=(0,))), Misfit)

    def test_replicas_must_all_find_room(self):
        misfit = self.places(QWEN, 3, offer())
        assert misfit.reason == (
            "qwen-7b needs 3 times 1 GPU with 17 GiB free; the freest of this cluster's 2 has 7 GiB"
        )

    def test_what_is_booked_at_any_time_is_taken(self):
        calendar = calendar_of(offer(), server=[(0, 1000, 0, None), (1, 300, 99, 100)])
        assert isinstance(self.places(QWEN, 1, offer(), calendar=calendar), Misfit)

    def test_cheapest_first_though_another_has_less_left(self):
        offers = [offer("a", "2"), offer("b", "1", (0,)), offer("c", "2")]
        calendar = calendar_of(*offers, a=[(0, 294, 0, None)])
        nodes = [p.node_id for p in self.places(QWEN, 2, *offers, calendar=calendar)]
        assert nodes == ["b", "a"]

    def test_among_equals_one_with_the_model_on_its_disk_and_best_in_its_memory(self):
        offers = [offer("a"), offer("b"), offer("c", "9"), offer("d")]
        disks = {name: {"qwen-7b"} for name in ("b", "c", "d")}
        (place,) = self.places(QWEN, 1, *offers, disks=disks)
        assert place.node_id == "b"
        (place,) = self.places(QWEN, 1, *offers, disks=disks, memory={"d": {"qwen-7b"}})
        assert place.node_id == "d"

    def test_memory_of_nodes_without_gpus_if_there_are_none(self):
        assert self.places(TINY, 3, self.LAPTOP) == (Place("laptop", "laptop"),) * 3
        misfit = self.places(TINY, 3, self.LAPTOP, cpu={"laptop": 1_000})
        assert misfit.reason == (
            "tiny-qwen needs 3 times 2 GiB of memory or 1 GPU with 2 GiB free; this cluster has "
            "none (its freest node has 0 GiB of memory left)"
        )
        assert self.places(TINY, 1, self.LAPTOP, offer())[0].node_id == "server"

    def test_big_model_says_what_is_missing(self):
        reason = self.places(QWEN, 1, self.LAPTOP).reason
        assert reason == (
            "qwen-7b needs 1 GPU with 17 GiB free; this cluster has none "
            "(its freest node has 3 GiB of memory left)"
        )
        small = self.places(QWEN, 1, offer(gpus=(Gpu(0, "t4", 15_360),)))
        assert small.reason.endswith("the freest of this cluster's 1 has 15 GiB")

    @pytest.mark.parametrize(
        "changes",
        [
            {"state": OfferState.DRAINING},
            {"state": OfferState.LOST},
            {"available_until": at(1000)},
            {"logical": True},
        ],
    )
    def test_not_where_it_could_not_stay(self, changes):
        assert isinstance(self.places(QWEN, 1, offer(**changes)), Misfit)

    def test_not_where_it_could_not_start(self):

        assert isinstance(self.places(QWEN, 1, offer(available_from=at(1))), Misfit)

    def test_logical_gpus_do_for_small_models(self):
        assert self.places(TINY, 1, offer(logical=True)) == (Place("server", "server", (0,), 42),)
