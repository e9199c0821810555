import pickle

import pytest

from market.calendar import Calendar, Oversubscribed


@pytest.fixture
def calendar():
    return with_nodes(a=2)


def with_nodes(**gpu_counts):
    calendar = Calendar()
    for node_id, gpu_count in gpu_counts.items():
        calendar.set_node(node_id, gpu_count)
    return calendar


def refusal(book, *arguments):
    with pytest.raises(Oversubscribed) as refused:
        book(*arguments)
    return refused.value.node_id, refused.value.gpu, refused.value.at


class TestNode:
    def test_grows_and_shrinks_while_nothing_needs_the_last_gpus(self, calendar):
        calendar.book("x", "a", (0,), 1000, 0, 10)
        calendar.set_node("a", 3)
        assert calendar.room("a", 0, 10) == (0, 1000, 1000)
        calendar.set_node("a", 1)
        assert calendar.room("a", 0, 10) == (0,)

    def test_keeps_gpus_that_are_booked(self, calendar):
        calendar.book("x", "a", (1,), 1, 0, 10)
        with pytest.raises(ValueError, match="cannot have only 1 GPU"):
            calendar.set_node("a", 1)
        assert calendar.room("a", 0, 10) == (1000, 999)

    def test_keeps_as_many_gpus_as_wait(self, calendar):
        calendar.book_any("x", "a", 0, 10)
        calendar.book_any("y", "a", 5, 15)
        with pytest.raises(ValueError, match="cannot have only 1 GPU"):
            calendar.set_node("a", 1)
        calendar.cut("y", 5)
        calendar.set_node("a", 1)
        assert calendar.bind("x") == 0

    def test_can_have_no_gpus(self):
        calendar = with_nodes(cpu=0)
        assert not calendar.any_room("cpu", 0, 1)
        assert refusal(calendar.book_any, "x", "cpu", 0, 1) == ("cpu", None, 0)
        with pytest.raises(ValueError, match="cannot have"):
            calendar.set_node("cpu", -1)

    def test_is_removed_only_without_bookings(self, calendar):
        calendar.book_any("x", "a", 0, 10)
        with pytest.raises(ValueError, match="has bookings"):
            calendar.remove_node("a")
        calendar.expire(10)
        calendar.remove_node("a")
        with pytest.raises(ValueError, match="unknown"):
            calendar.room("a", 10, 11)


class TestBook:
    def test_shares_a_gpu_to_the_last_milli(self, calendar):
        calendar.book("x", "a", (0,), 600, 0, 10)
        calendar.book("y", "a", (0, 1), 400, 5, 15)
        assert calendar.room("a", 0, 20) == (0, 600)
        assert calendar.room("a", 10, 15) == (600, 600)

    def test_intervals_leave_out_their_ends(self, calendar):
        calendar.book("x", "a", (0,), 1000, 5, 10)
        calendar.book("before", "a", (0,), 1000, 0, 5)
        calendar.book("after", "a", (0,), 1000, 10, 15)
        assert calendar.room("a", 0, 15) == (0, 1000)

    def test_says_where_and_when_it_does_not_fit_and_changes_nothing(self, calendar):
        calendar.book("x", "a", (1,), 600, 5, 10)
        assert refusal(calendar.book, "y", "a", (0, 1), 401, 0, 20) == ("a", 1, 5)
        assert refusal(calendar.book, "y", "a", (1,), 401, 7, 20) == ("a", 1, 7)
        assert calendar.room("a", 0, 20) == (1000, 400)

    def test_may_be_open_ended(self, calendar):
        calendar.book("x", "a", (0,), 300, 5, None)
        calendar.book_any("y", "a", 5, None)
        assert calendar.room("a", 0, 5) == (1000, 1000)
        assert calendar.room("a", 10**9, None) == (700, 0)
        assert refusal(calendar.book_any, "z", "a", 0, None) == ("a", None, 5)

    def test_leaves_gpus_to_those_that_wait(self, calendar):
        calendar.book_any("w", "a", 5, 10)
        calendar.book("x", "a", (0,), 1, 5, 10)
        assert refusal(calendar.book, "y", "a", (1,), 1, 7, 8) == ("a", 1, 5)
        assert refusal(calendar.book, "y", "a", (1,), 1, 20, 30) == ("a", 1, 5)
        assert calendar.bind("w") == 1

    @pytest.mark.parametrize(
        ("gpus", "milli", "start", "end"),
        [
            ((), 1000, 0, 10),
            ((2,), 1000, 0, 10),
            ((0, 0), 500, 0, 10),
            ((0,), 0, 0, 10),
            ((0,), 1001, 0, 10),
            ((0,), 1000, 10, 5),
            ((0,), 1000, 0, 2**63),
        ],
    )
    def test_what_makes_no_sense_is_an_error(self, calendar, gpus, milli, start, end):
        with pytest.raises(ValueError, match="GPUs"):
            calendar.book("x", "a", gpus, milli, start, end)
        assert calendar.room("a", 0, None) == (1000, 1000)

    def test_ids_are_used_once(self, calendar):
        calendar.book("x", "a", (0,), 1000, 0, 10)
        with pytest.raises(ValueError, match="used before: x"):
            calendar.book("x", "a", (1,), 1000, 0, 10)
        with pytest.raises(ValueError, match="used before: x"):
            calendar.book_any("x", "a", 0, 10)

    def test_refusals_survive_pickling(self):
        refused = pickle.loads(pickle.dumps(Oversubscribed("a", 1, 5)))
        assert (refused.node_id, refused.gpu, refused.at) == ("a", 1, 5)
        assert str(refused) == "no room on GPU 1 of a at 5"
        assert str(Oversubscribed("a", None, 5)) == "no GPU of a at 5"


class TestBookAny:
    def test_counts_only_how_many_overlap(self):
        # Bound when booked, the first two could have blocked both GPUs for the last.
        calendar = with_nodes(a=2)
        for booking_id, start, end in [("x", 0, 4), ("y", 6, 10), ("z", 3, 7), ("w", 8, 12)]:
            assert calendar.book_any(booking_id, "a", start, end) is None
        assert refusal(calendar.book_any, "v", "a", 2, 5) == ("a", None, 3)
        assert [calendar.bind(booking_id) for booking_id in "xzyw"] == [0, 1, 0, 1]

    def test_takes_a_gap_at_once_if_it_cannot_wait(self, calendar):
        calendar.book("x", "a", (0, 1), 1000, 10, 20)
        assert calendar.any_room("a", 0, 10)
        assert calendar.book_any("y", "a", 0, 10) == 0
        assert calendar.bind("y") == 0
        assert not calendar.any_room("a", 0, 11)
        assert refusal(calendar.book_any, "z", "a", 0, 11) == ("a", None, 0)

    def test_never_waits_for_an_only_gpu(self):
        calendar = with_nodes(a=1)
        assert calendar.book_any("x", "a", 5, 10) == 0
        calendar.book("y", "a", (0,), 500, 20, None)


class TestBind:
    def test_takes_the_lowest_free_gpu(self):
        calendar = with_nodes(a=3)
        calendar.book("x", "a", (0,), 1, 0, 10)
        calendar.book_any("y", "a", 5, 15)
        calendar.book_any("z", "a", 10, 15)
        assert calendar.bind("y") == 1
        assert calendar.bind("z") == calendar.bind("z") == 0
        assert calendar.room("a", 10, 15) == (0, 0, 1000)

    def test_leaves_the_gpu_of_one_that_started_before(self, calendar):
        calendar.book("fixed", "a", (1,), 1000, 0, 5)
        calendar.book_any("first", "a", 3, 10)
        calendar.book_any("second", "a", 5, 10)
        assert calendar.bind("second") == 1
        assert calendar.bind("first") == 0

    def test_refuses_to_take_the_gpu_of_one_that_started_before(self, calendar):
        calendar.book("fixed", "a", (1,), 1000, 0, 20)
        calendar.book_any("first", "a", 3, 5)
        calendar.book_any("second", "a", 5, 10)
        with pytest.raises(ValueError, match="starts before second"):
            calendar.bind("second")
        assert calendar.bind("first") == 0
        assert calendar.bind("second") == 0

    def test_makes_room_behind_it_if_early(self, calendar):
        calendar.book_any("x", "a", 5, 10)
        calendar.book_any("y", "a", 6, 12)
        assert refusal(calendar.book, "z", "a", (0, 1), 1000, 20, 30) == ("a", 1, 5)
        assert [calendar.bind(booking_id) for booking_id in "xy"] == [0, 1]
        calendar.book("z", "a", (0, 1), 1000, 20, 30)

    def test_may_come_late(self, calendar):
        calendar.book("fixed", "a", (0,), 1000, 0, 5)
        calendar.book_any("x", "a", 3, 10)
        calendar.book_any("y", "a", 5, 10)
        calendar.expire(7)
        assert [calendar.bind("y"), calendar.bind("x")] == [0, 1]


class TestExtend:
    def test_takes_what_comes_after(self, calendar):
        calendar.book("x", "a", (0, 1), 500, 0, 10)
        calendar.extend("x", 20)
        assert calendar.room("a", 10, 20) == (500, 500)
        calendar.extend("x", None)
        assert calendar.room("a", 20, None) == (500, 500)

    def test_is_refused_where_another_begins_and_changes_nothing(self, calendar):
        calendar.book("x", "a", (0,), 1000, 0, 10)
        calendar.book("y", "a", (0,), 1000, 15, 20)
        assert refusal(calendar.extend, "x", 16) == ("a", 0, 15)
        calendar.book("z", "a", (0,), 1000, 10, 15)

    def test_of_one_that_waits_is_counted(self, calendar):
        calendar.book_any("x", "a", 0, 10)
        calendar.book_any("y", "a", 0, 20)
        calendar.book_any("z", "a", 15, 20)
        assert refusal(calendar.extend, "x", 16) == ("a", None, 15)
        calendar.extend("x", 15)
        assert [calendar.bind(booking_id) for booking_id in "xyz"] == [0, 1, 0]

    def test_neither_shortens_nor_fails_without_change(self, calendar):
        calendar.book("x", "a", (0,), 1000, 0, 10)
        calendar.extend("x", 10)
        with pytest.raises(ValueError, match="cut"):
            calendar.extend("x", 9)


class TestCut:
    def test_gives_back_the_rest(self, calendar):
        calendar.book("x", "a", (0, 1), 700, 0, 10)
        calendar.cut("x", 10)
        assert calendar.room("a", 0, 10) == (300, 300)
        calendar.cut("x", 4)
        assert calendar.room("a", 0, 4) == (300, 300)
        assert calendar.room("a", 4, 10) == (1000, 1000)

    @pytest.mark.parametrize("at", [5, 0])
    def test_removes_what_has_not_started(self, calendar, at):
        calendar.book("x", "a", (0,), 1000, 5, 10)
        calendar.cut("x", at)
        calendar.book("x", "a", (0, 1), 1000, 0, None)

    def test_reaches_back_before_what_is_expired(self, calendar):
        calendar.book("x", "a", (0,), 1000, 0, 20)
        calendar.expire(10)
        calendar.cut("x", 5)
        assert calendar.room("a", 0, 20) == (1000, 1000)
        with pytest.raises(ValueError, match="unknown: x"):
            calendar.cut("x", 5)


class TestExpire:
    def test_keeps_what_is_running(self, calendar):
        calendar.book("over", "a", (0,), 1000, 0, 10)
        calendar.book("running", "a", (1,), 1000, 0, 11)
        calendar.book_any("waiting", "a", 10, 20)
        calendar.expire(10)
        assert calendar.room("a", 10, 11) == (0, 0)
        assert calendar.bind("waiting") == 0
        with pytest.raises(ValueError, match="unknown: over"):
            calendar.extend("over", 20)
        calendar.extend("running", 20)

    def test_never_goes_back(self, calendar):
        calendar.expire(10)
        calendar.expire(5)
        with pytest.raises(ValueError, match="no booking"):
            calendar.book("x", "a", (0,), 1000, 6, 10)
        calendar.book("x", "a", (0,), 1000, 6, 11)

    def test_keeps_profiles_short(self, calendar):
        for hour in range(1000):
            calendar.book(f"x{hour}", "a", (0,), 1000, hour, hour + 1)
            calendar.book_any(f"y{hour}", "a", hour, hour + 2)
            calendar.cut(f"y{hour}", hour + 1)
            calendar.expire(hour)
        node = calendar._nodes["a"]
        steps = [len(profile.times) for profile in (*node.gpus, node.load, node.claims)]
        assert max(steps) <= 4
        assert len(calendar._bookings) == len(node.bookings) == 2


class TestRoom:
    def test_is_the_least_over_the_interval(self, calendar):
        calendar.book("x", "a", (0,), 300, 0, 10)
        calendar.book("y", "a", (0,), 600, 10, 20)
        assert calendar.room("a", 0, 5) == (700, 1000)
        assert calendar.room("a", 5, 15) == (400, 1000)
        assert calendar.room("a", 20, None) == (1000, 1000)

    def test_is_the_most_of_what_can_be_had_if_others_wait(self):
        calendar = with_nodes(a=3)
        calendar.book("x", "a", (0,), 300, 0, 10)
        calendar.book_any("y", "a", 12, 20)
        calendar.book_any("z", "a", 12, 20)
        assert calendar.room("a", 0, 20) == (0, 1000, 0)


class TestPick:
    def test_fills_gpus_that_are_shared_already(self):
        calendar = with_nodes(a=3)
        calendar.book("x", "a", (1,), 500, 0, 10)
        assert calendar.pick("a", 1, 500, 0, 10) == (1,)
        assert calendar.pick("a", 2, 500, 0, 10) == (0, 1)

    def test_takes_gaps_before_gpus_that_could_be_waited_for(self):
        calendar = with_nodes(a=3)
        calendar.book("x", "a", (2,), 1000, 10, 20)
        assert calendar.pick("a", 1, 1000, 0, 10) == (2,)
        assert calendar.pick("a", 1, 1000, 0, 11) == (0,)


class TestEarliest:
    def test_is_now_or_when_something_ends(self, calendar):
        calendar.book("x", "a", (0,), 1000, 0, 10)
        calendar.book("y", "a", (1,), 1000, 3, 15)
        assert calendar.earliest("a", 1, 1000, 3, 0) == 0
        assert calendar.earliest("a", 1, 1000, 4, 0) == 10
        assert calendar.earliest("a", 2, 500, 1, 0) == 15
        assert calendar.earliest("a", 2, 500, 1, 17) == 17

    def test_may_be_never(self, calendar):
        calendar.book("x", "a", (0,), 1, 50, None)
        assert calendar.earliest("a", 3, 1, 10, 0) is None
        assert calendar.earliest("a", 2, 1000, 51, 0) is None
        assert calendar.earliest("a", 2, 1000, 50, 0) == 0

    def test_of_a_whole_gpu_is_when_it_can_wait(self, calendar):
        calendar.book_any("x", "a", 0, 10)
        calendar.book_any("y", "a", 5, 12)
        assert calendar.earliest("a", 1, 1000, 100, 0) == 10
        calendar.book_any("z", "a", calendar.earliest("a", 1, 1000, 100, 0), 110)
        assert [calendar.bind(booking_id) for booking_id in "xyz"] == [0, 1, 0]


class TestConflicts:
    def test_names_those_that_leave_too_little_room(self, calendar):
        calendar.book("x", "a", (0,), 600, 0, 10)
        calendar.book("y", "a", (0,), 300, 5, 15)
        calendar.book("z", "a", (1,), 1000, 0, 10)
        assert calendar.conflicts("a", (0,), 200, 0, 20) == ("x", "y")
        assert calendar.conflicts("a", (0,), 500, 0, 20) == ("x", "y")
        assert calendar.conflicts("a", (0,), 500, 0, 5) == ("x",)
        assert calendar.conflicts("a", (0,), 500, 10, 20) == ()
        assert calendar.conflicts("a", (0, 1), 1000, 9, 20) == ("x", "y", "z")

    def test_names_those_that_wait(self, calendar):
        calendar.book_any("x", "a", 0, 10)
        calendar.book_any("y", "a", 5, 15)
        calendar.book_any("z", "a", 20, 30)
        assert calendar.conflicts("a", (0,), 1, 12, 14) == ("x", "y")
        assert calendar.conflicts("a", (0, 1), 1, 12, 14) == ("x",)


class TestBestNode:
    def test_prefers_the_tightest_gap(self):
        calendar = with_nodes(a=1, b=1, c=1)
        calendar.book("x", "a", (0,), 1000, 0, 5)
        calendar.book("y", "b", (0,), 1000, 0, 8)
        calendar.book("z", "b", (0,), 1000, 25, 30)
        calendar.book("w", "a", (0,), 1000, 21, 30)
        assert calendar.best_node(["a", "b", "c"], 1, 1000, 10, 20) == "a"
        assert calendar.best_node(["a", "b", "c"], 1, 1000, 10, 21) == "a"
        assert calendar.best_node(["a", "b", "c"], 1, 1000, 10, 22) == "b"
        assert calendar.best_node(["a", "b", "c"], 1, 1000, 10, 26) == "c"

    def test_takes_gaps_then_open_ends_then_empty_nodes_by_id(self):
        calendar = with_nodes(a=2, b=2, c=2)
        assert calendar.best_node(["c", "b", "a"], 2, 1000, 60, 70) == "a"
        calendar.book("x", "c", (0,), 1, 50, None)
        calendar.book("y", "b", (0,), 1, 40, 100)
        assert calendar.best_node(["c", "b", "a"], 2, 1000, 60, 70) == "a"
        assert calendar.best_node(["c", "b", "a"], 2, 999, 60, 70) == "b"
        assert calendar.best_node(["c", "a"], 2, 999, 60, 70) == "c"

    def test_is_none_where_nothing_fits(self, calendar):
        calendar.book("x", "a", (0,), 1, 0, 10)
        assert calendar.best_node(["a"], 2, 1000, 5, 20) is None

    def test_is_where_one_of_any_gpu_can_be_booked(self):
        calendar = with_nodes(a=2, b=2)
        calendar.book("x", "a", (0, 1), 1, 0, 10)
        calendar.book("y", "b", (0, 1), 1, 30, 40)
        assert calendar.best_node(["a", "b"], 1, 1000, 5, 30) == "b"
        assert calendar.book_any("z", "b", 5, 30) == 0
        assert calendar.best_node(["a", "b"], 1, 1000, 10, 31) == "a"
        assert calendar.book_any("w", "a", 10, 31) is None

    def test_gives_whole_gpus_to_those_that_can_wait_and_shares_where_they_fit(self, calendar):
        calendar.book_any("x", "a", 0, 5)
        calendar.book_any("y", "a", 0, 5)
        assert calendar.best_node(["a"], 1, 1000, 5, 10) == "a"
        assert calendar.best_node(["a"], 1, 999, 5, 10) is None

    def test_sees_those_that_wait(self):
        calendar = with_nodes(a=2, b=2)
        calendar.book_any("x", "b", 0, 5)
        assert calendar.best_node(["a", "b"], 1, 1000, 5, 10) == "b"
        calendar.book("y", "a", (0,), 1, 0, 4)
        assert calendar.best_node(["a", "b"], 1, 1000, 5, 10) == "b"

    def test_knows_its_nodes(self, calendar):
        with pytest.raises(ValueError, match="unknown: b"):
            calendar.best_node(["a", "b"], 1, 1000, 0, 10)
